"""Growth as a Gymnasium environment: an agent decides when and where networks grow while they train."""

from morphogen.envs.config import GrowthEnvConfig as GrowthEnvConfig
from morphogen.envs.env import GrowthEnv as GrowthEnv
from morphogen.envs.registration import register
from morphogen.envs.vector import GrowthVectorEnv as GrowthVectorEnv

register()
