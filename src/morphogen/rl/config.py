"""Every knob of PPO, declared once; what belongs to one part is declared beside that part and collected here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from morphogen.config import Config
from morphogen.rl.actions import ActionConfig
from morphogen.rl.adversarial import AdversarialConfig
from morphogen.rl.critics import CriticConfig
from morphogen.rl.gradient_variance import GradientVarianceConfig
from morphogen.rl.kl_penalty import KLPenaltyConfig
from morphogen.rl.policy import PolicyConfig
from morphogen.rl.schedules import Schedule

STRUCTURAL = frozenset(
    {
        *("num_envs", "policy", "action", "critic", "gradient_variance"),
        *("normalize_observations", "normalize_rewards", "normalize_values"),
        *("precision", "compile", "num_threads", "seed", "device"),
    }
)
"""Settings that what is built depends on. All others are live: ``PPO.reconfigure`` changes them between updates."""


class PPOConfig(Config):
    """How to train. Defaults are those of the literature for continuous control and small discrete tasks.

    A schedule is a number, a schedule object such as ``Linear(start=1e-3, end=0.0)``, or a function of the fraction of training
    done; see :mod:`morphogen.rl.schedules`.

    Attributes:
        num_envs: Environments, where PPO makes them from an id.
        rollout_steps: Steps of each environment between two updates.
        minibatch_size: Rows of a minibatch; with memory, whole sequences are taken until there are about as many.
        epochs: Passes over the rows of an update.
        learning_rate: Of Adam; a schedule.
        clip_range: How far the ratio may leave 1 and still be rewarded for it; a schedule.
        value_clip_range: How far a value may move from the one of the rollout, in the frame of the critic; None: any way.
        ratio: "joint" clips the ratio of whole actions, "per_head" that of each head of an action, by itself.
        entropy_coef: Weight of the entropy of all heads; a schedule.
        value_coef: Weight of the critics' loss.
        gamma: Discount, in [0, 1].
        gae_lambda: Weight of later rows in advantages and returns, in [0, 1].
        max_grad_norm: Gradients are scaled down to this norm; None: never.
        normalize_advantages: Give the advantages of each minibatch mean 0 and deviation 1.
        target_kl: No further epoch once the mean KL of an epoch exceeds 1.5 times this; None: all epochs.
        sequence_steps: Longest sequence that memory is trained through; None: as long as the rollout.
        normalize_observations: Subtract the running mean, divide by the running deviation.
        normalize_rewards: Divide by the running deviation of the discounted return.
        normalize_values: Critics predict returns minus their running mean, over their running deviation.
        policy: The network.
        action: The distribution of actions.
        critic: What the critics predict.
        kl_penalty: Penalise the KL divergence from the policy of the rollout; None: clipping alone.
        gradient_variance: Scale gradients down where they are noisy; None: off.
        adversarial: Train against perturbed observations; None: off.
        precision: "fp32", "bf16" or "fp16" (CUDA only, with a gradient scaler) for the update's forward passes; "auto" is bf16
            on CUDA for networks at least 256 wide, else fp32. Rollouts, ratios and losses are always fp32.
        compile: Run the network through ``torch.compile``.
        num_threads: Threads of torch while learning; None leaves them alone. One is fastest for small networks.
        schedule_steps: Environment steps at which schedules end; None: those of the present call of ``learn``.
        seed: Root of all chance.
        device: Where the network is.
    """

    num_envs: int = Field(default=8, ge=1)
    rollout_steps: int = Field(default=128, ge=1)
    minibatch_size: int = Field(default=256, ge=1)
    epochs: int = Field(default=10, ge=1)
    learning_rate: Schedule = 3e-4
    clip_range: Schedule = 0.2
    value_clip_range: float | None = Field(default=None, gt=0)
    ratio: Literal["joint", "per_head"] = "joint"
    entropy_coef: Schedule = 0.0
    value_coef: float = Field(default=0.5, ge=0)
    gamma: float = Field(default=0.99, ge=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    max_grad_norm: float | None = Field(default=0.5, gt=0)
    normalize_advantages: bool = True
    target_kl: float | None = Field(default=None, gt=0)
    sequence_steps: int | None = Field(default=None, ge=1)
    normalize_observations: bool = False
    normalize_rewards: bool = False
    normalize_values: bool = False
    policy: PolicyConfig = PolicyConfig()
    action: ActionConfig = ActionConfig()
    critic: CriticConfig = CriticConfig()
    kl_penalty: KLPenaltyConfig | None = None
    gradient_variance: GradientVarianceConfig | None = None
    adversarial: AdversarialConfig | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    num_threads: int | None = Field(default=1, ge=1)
    schedule_steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.sequence_steps is not None and self.policy.memory == "none":
            raise ValueError("`sequence_steps` must be None without memory: it would have no effect. Leave it out.")
        if self.precision == "fp16" and not self.device.startswith("cuda"):
            raise ValueError(f'`precision` must be "bf16" or "fp32" on {self.device}, got "fp16". Set device="cuda".')
        return self
