"""Critics: what the last layer of a value network means, what it learns from a return, and what can be read from it.

A :class:`Critic` has no weights. Advantages need its value; quantile and categorical critics also know how returns scatter.
They learn that only from targets that scatter as returns do, which :func:`sample_returns` makes: regressed on lambda-returns,
as a scalar critic is, their spread comes out several times too narrow.
"""

from morphogen.rl.critics.base import Critic as Critic
from morphogen.rl.critics.categorical import CategoricalCritic as CategoricalCritic
from morphogen.rl.critics.config import CriticConfig as CriticConfig, make as make
from morphogen.rl.critics.quantile import QuantileCritic as QuantileCritic
from morphogen.rl.critics.scalar import ScalarCritic as ScalarCritic
from morphogen.rl.critics.targets import (
    choose_samples as choose_samples,
    lowest_samples as lowest_samples,
    sample_returns as sample_returns,
)
