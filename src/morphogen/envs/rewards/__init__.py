"""Rewards: sums of named terms, each a pure function of what a step was, written after the action was executed.

``RewardConfig.preset`` names the sum; ``describe()`` shows every preset, term, formula and constant. Points are scaled so that
one percentage point of the metric is 0.1. What has to hold for every preset: an episode of WAIT earns its terminal term alone;
what shaping pays adds up to nothing, discounted; every number a term reads is in the frames or in the ledger, and so is in
the observation.
"""

from morphogen.envs.rewards.config import (
    PRESETS as PRESETS,
    ChurnConfig as ChurnConfig,
    CreditConfig as CreditConfig,
    DripConfig as DripConfig,
    HastyPruneConfig as HastyPruneConfig,
    LossConfig as LossConfig,
    Preset as Preset,
    RentConfig as RentConfig,
    RewardConfig as RewardConfig,
    StageConfig as StageConfig,
    require_same_gamma as require_same_gamma,
)
from morphogen.envs.rewards.describing import describe as describe, table as table
from morphogen.envs.rewards.ledger import Ledger as Ledger
from morphogen.envs.rewards.paying import Rewards as Rewards
from morphogen.envs.rewards.presets import TERMS as TERMS, TERMS_OF as TERMS_OF, objective as objective
