"""Blueprints: what a seed can be. One file and one line in the import below for each."""

from morphogen.growth.blueprints import (
    conv1d as conv1d,
    conv3x3 as conv3x3,
    depthwise as depthwise,
    low_rank as low_rank,
    mlp as mlp,
    norm as norm,
    squeeze_excite as squeeze_excite,
)
from morphogen.growth.blueprints.registry import Blueprint as Blueprint, blueprint as blueprint, get as get, names as names
