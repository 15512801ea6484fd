"""Reinforcement learning: PPO for any Gymnasium environment, composed from torso, memory, action distribution and critic."""

from morphogen.rl.actions import ActionConfig as ActionConfig, HeadConfig as HeadConfig
from morphogen.rl.adversarial import AdversarialConfig as AdversarialConfig
from morphogen.rl.config import PPOConfig as PPOConfig
from morphogen.rl.critics import CriticConfig as CriticConfig
from morphogen.rl.evaluation import EvaluationResult as EvaluationResult
from morphogen.rl.events import EpisodesRestarted as EpisodesRestarted, Updated as Updated
from morphogen.rl.gradient_variance import GradientVarianceConfig as GradientVarianceConfig
from morphogen.rl.kl_penalty import KLPenaltyConfig as KLPenaltyConfig
from morphogen.rl.parameters import ParametersReport as ParametersReport
from morphogen.rl.policy import PolicyConfig as PolicyConfig
from morphogen.rl.ppo import PPO as PPO
from morphogen.rl.schedules import Cosine as Cosine, Linear as Linear, Points as Points
from morphogen.rl.vector import make_vector as make_vector
