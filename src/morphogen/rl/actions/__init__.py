"""Distributions over actions: one for each kind of action space, all with the same few methods."""

from morphogen.rl.actions.base import ActionDistribution as ActionDistribution, Evaluation as Evaluation
from morphogen.rl.actions.factored import FactoredDistribution as FactoredDistribution
from morphogen.rl.actions.gaussian import (
    GaussianDistribution as GaussianDistribution,
    SquashedGaussianDistribution as SquashedGaussianDistribution,
)
from morphogen.rl.actions.heads import HeadConfig as HeadConfig
from morphogen.rl.actions.making import ActionConfig as ActionConfig, make as make
