"""What every distribution over actions can do, whatever the action space.

Shapes: B rows, A outputs of the policy's last layer, H action heads, M mask width, N environments.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Log-probabilities and entropies of given actions, head by head.

    Attributes:
        log_prob_BH: Log-probability (density for continuous actions) of each head's choice given the choices it depends
            on, float32 (float64 for float64 outputs); their sum over H is that of the action. Exactly 0, without gradient,
            where the head is irrelevant.
        entropy_BH: Entropy in nats of each head given the choices it depends on, also where the head is irrelevant, so
            that an entropy bonus reaches heads that rarely matter.
        relevant_BH: Whether the head had any say in what happened, bool; None if every head always has.
    """

    log_prob_BH: Tensor
    entropy_BH: Tensor
    relevant_BH: Tensor | None = None

    @property
    def entropy_B(self) -> Tensor:
        """The entropies of the relevant heads, summed: an unbiased estimate of the entropy of the whole action."""
        if self.relevant_BH is None:
            return self.entropy_BH.sum(1)
        return (self.entropy_BH * self.relevant_BH).sum(1)


class ActionDistribution(nn.Module, abc.ABC):
    """A family of distributions over the actions of one space, told apart by the outputs of the policy's last layer.

    A row of outputs fixes one distribution. Actions are kept flat, in the form in which their probability is defined
    (choices counted from zero, continuous actions before clipping or squashing); :meth:`to_env` turns them into what the
    environment takes. All maths is float32 (float64 for float64 outputs), on the device of the inputs.

    Attributes:
        num_outputs: A, the width of the policy's last layer.
        num_heads: H, the number of choices that make up an action and have a log-probability of their own.
        mask_width: M, the entries of a mask: as many as outputs, or 0 if no mask is taken.
        action_shape: Shape of one action as stored, without the batch.
        action_dtype: Dtype of actions as stored.
    """

    num_outputs: int
    num_heads: int
    mask_width: int
    action_shape: tuple[int, ...]
    action_dtype: torch.dtype

    def initial_outputs(self) -> Tensor:
        """Return the bias with which the policy's last layer starts, float32 ``[A]``; zeros unless there is a preference."""
        return torch.zeros(self.num_outputs)

    @abc.abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return all the chance of actions for rows of ``shape``, float32 ``[*shape, width]`` on the generator's device.

        One call can serve a whole rollout (``shape = (steps, environments)``): the action of an environment then depends
        on its own entries alone, whatever the others do.
        """

    @abc.abstractmethod
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return actions, a deterministic function of ``outputs_BA`` and ``noise`` (``[B, width]``).

        Call it under ``torch.no_grad()``: nothing here is meant to be differentiated through the choice.
        """

    def sample(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(actions, log_prob_BH)``: what :meth:`draw` gives, and its log-probabilities by :meth:`evaluate`."""
        actions = self.draw(outputs_BA, noise, mask_BM)
        return actions, self.evaluate(outputs_BA, actions, mask_BM).log_prob_BH

    @abc.abstractmethod
    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return the deterministic actions: each head's most probable choice given those before it; the mean of a Gaussian."""

    @abc.abstractmethod
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        """Return log-probabilities and entropies of ``actions`` (``[B, *action_shape]``) with gradient to ``outputs_BA``."""

    @abc.abstractmethod
    def kl(
        self,
        outputs_old_BA: Tensor,
        outputs_new_BA: Tensor,
        mask_BM: Tensor | None = None,
        snapshot_old: Tensor | None = None,
    ) -> Tensor:
        """Return the exact ``KL(old || new)`` of whole actions, ``[B]``, in nats, with gradient to both outputs.

        ``snapshot_old`` is what :meth:`snapshot` gave when the old outputs were made; None stands for today's.
        """

    def snapshot(self) -> Tensor | None:
        """Return a copy of what the distribution hangs on beside the outputs (a Gaussian's ``log_std_A``); None if nothing."""
        return None

    @abc.abstractmethod
    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Return ``actions`` as the environment takes them: a new array of the space's dtype, ``[B, *space.shape]``."""

    @abc.abstractmethod
    def flatten_mask(self, value: object, num_envs: int) -> NDArray[np.bool_]:
        """Return a mask in any accepted form as one bool array ``[num_envs, M]``, True where allowed.

        It may share memory with ``value``.

        Raises:
            ValueError: The form, a shape or a dtype is not accepted, or the space takes no mask.
        """

    @abc.abstractmethod
    def check_mask(self, mask_NM: NDArray[np.bool_]) -> None:
        """Raise ValueError, naming environment and head, where a choice that may be needed has nothing allowed."""

    def read_mask(self, value: object, num_envs: int) -> NDArray[np.bool_]:
        """Return :meth:`flatten_mask` of ``value`` once :meth:`check_mask` has accepted it."""
        mask_NM = self.flatten_mask(value, num_envs)
        self.check_mask(mask_NM)
        return mask_NM


def full_precision(outputs: Tensor) -> Tensor:
    """Return ``outputs`` in float32, or as they are if float64."""
    return outputs if outputs.dtype is torch.float64 else outputs.float()
