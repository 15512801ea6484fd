"""Blueprints: what a seed can be. One file and one line in the import below for each."""

from morphogen.growth.blueprints import (
    attention as attention,
    bottleneck as bottleneck,
    conv1d as conv1d,
    conv3x3 as conv3x3,
    conv_heavy as conv_heavy,
    depthwise as depthwise,
    flex_attention as flex_attention,
    glu as glu,
    low_rank as low_rank,
    low_rank_large as low_rank_large,
    mlp as mlp,
    mlp_large as mlp_large,
    mlp_small as mlp_small,
    norm as norm,
    squeeze_excite as squeeze_excite,
    widen as widen,
)
from morphogen.growth.blueprints.catalogue import table as table
from morphogen.growth.blueprints.registry import Blueprint as Blueprint, blueprint as blueprint, get as get, names as names
