"""What every critic is.

Shapes: B rows (or several dimensions of them), K outputs of a critic, S samples of a return. A critic computes in float32,
whatever comes in, and in whatever frame its targets are in: where the caller normalises returns, values and samples are
normalised ones. It has no weights, but constants, so it has to be on the device of what it is given: ``critic.to(device)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Critic(nn.Module, ABC):
    """How ``num_outputs`` numbers stand for the return that follows a state.

    Attributes:
        num_outputs: K, the width of the last layer of the value network.
        is_distributional: It learns a distribution, from several samples of the return to a row; else one return is enough.
    """

    num_outputs: int
    is_distributional: ClassVar[bool]

    @abstractmethod
    def value(self, outputs_BK: Tensor) -> Tensor:
        """Return the expected return of each row, [B], differentiable."""

    @abstractmethod
    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        """Return ``num`` equally likely values of the return, [B, S], whose mean is :meth:`value`; rising unless they cross."""

    @abstractmethod
    def loss(
        self,
        outputs_BK: Tensor,
        targets_BS: Tensor,
        old_outputs_BK: Tensor | None = None,
        clip_range: float | None = None,
    ) -> Tensor:
        """Return how far each row is from its targets, [B]; never averaged over rows.

        With ``clip_range``, a row's loss is the larger of two: as it is, and with everything predicted moved to within
        ``clip_range`` of what ``old_outputs_BK`` predicted (PPO's value clipping).

        Args:
            outputs_BK: What the last layer says now; the loss is differentiable with respect to it alone.
            targets_BS: Equally likely returns of each row, any number of them.
            old_outputs_BK: What the last layer said when the rollout was made.
            clip_range: How far a prediction may move and still gain from it, in the frame of the targets.
        """

    @abstractmethod
    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        """Return the least return [B] that is not exceeded with probability ``level``, in (0, 1]."""

    @abstractmethod
    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        """Return the mean [B] of the lowest ``level`` of returns, in (0, 1]: the conditional value at risk, as a return."""

    @abstractmethod
    def initial_bias(self) -> Tensor:
        """Return a bias [K] for the last layer with which an untrained critic expects a return of about 0; a new tensor."""


def check_rows(outputs_BK: Tensor, targets_BS: Tensor, num_outputs: int) -> None:
    """Raise ValueError unless outputs are [B, num_outputs] and targets have the same rows: broadcasting would couple rows."""
    if outputs_BK.shape[-1] != num_outputs or targets_BS.shape[:-1] != outputs_BK.shape[:-1]:
        raise ValueError(
            f"`targets_BS` must be [B, S] where `outputs_BK` is [B, {num_outputs}], got {list(targets_BS.shape)} and "
            f"{list(outputs_BK.shape)}. Give one column for a single return: targets.unsqueeze(-1)."
        )


def check_level(level: float, least: float = 0.0) -> None:
    """Raise ValueError unless ``level`` is in (0, 1] and not below ``least``."""
    if not 0 < level <= 1:
        raise ValueError(f"`level` must be in (0, 1], got {level}. 0.1 is the worst tenth of returns, 1 is all of them.")
    if level < least:
        raise ValueError(
            f"`level` must be at least {least:g}, got {level}. So far down this critic knows nothing: give it more outputs."
        )


def clipped_loss(
    loss_of: Callable[[Tensor], Tensor],
    points_BK: Tensor,
    old_points_BK: Tensor | None,
    clip_range: float | None,
) -> Tensor:
    """Return ``loss_of(points_BK)``, or with a clip range the larger, row by row, of that and the loss of the clipped points.

    The clipped points are old_points + clamp(points - old_points, -clip_range, clip_range), each by itself, with no gradient
    through old ones. Row by row the result is never below the plain loss.

    Raises:
        ValueError: Only one of ``old_points_BK`` and ``clip_range`` was given.
    """
    if old_points_BK is None and clip_range is None:
        return loss_of(points_BK)
    if old_points_BK is None or clip_range is None:
        raise ValueError("`old_outputs_BK` and `clip_range` must be given together, got one alone. Give both, or neither.")
    old_points_BK = old_points_BK.detach()
    near_BK = old_points_BK + (points_BK - old_points_BK).clamp(-clip_range, clip_range)
    return torch.maximum(loss_of(points_BK), loss_of(near_BK))
