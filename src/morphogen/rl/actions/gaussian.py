"""Continuous actions: a Gaussian with a spread of its own, clipped or squashed into the box.

Shapes: B rows, A outputs of the policy's last layer (= action dimensions, flat), M mask width (0), N environments, Q nodes of
a quadrature.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor, nn

from morphogen.rl.actions.base import ActionDistribution, Evaluation, full_precision

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
NUM_NODES = 8
NO_MASK = "an action mask must not be given for continuous actions, got one. Remove it: only discrete choices have masks."


class GaussianDistribution(ActionDistribution):
    """Independent Gaussians: means from the policy, log standard deviations as parameters that no observation moves.

    log p(a) = -sum_i [ (a_i - mean_i)^2 / (2 exp(2 log_std_i)) + log_std_i + log(2 pi) / 2 ], one value for the whole action
    (H = 1). What is stored and evaluated is the action before it is clipped to the box.

    Args:
        space: A Box of floats.
        log_std_init: Start of every entry of ``log_std_A``, the one parameter.

    Example:
        >>> actions = GaussianDistribution(Box(-2.0, 2.0, (3,)), log_std_init=-1.0)
        >>> drawn, _ = actions.sample(torch.zeros(5, 3), torch.full((5, 3), 9.0))
        >>> actions.to_env(drawn.detach()).max()
        np.float32(2.0)
    """

    def __init__(self, space: Box, log_std_init: float) -> None:
        """Start every standard deviation at ``exp(log_std_init)``."""
        super().__init__()
        self.num_outputs = math.prod(space.shape)
        self.num_heads, self.mask_width = 1, 0
        self.action_shape, self.action_dtype = (self.num_outputs,), torch.float32
        self.log_std_A = nn.Parameter(torch.full((self.num_outputs,), log_std_init))
        self._space = space

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return standard normal numbers, one for each dimension of the action."""
        return torch.empty(*shape, self.num_outputs, device=generator.device).normal_(generator=generator)

    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return ``mean + std * noise``; see the base class."""
        _refuse_mask(mask_BM)
        return torch.addcmul(full_precision(outputs_BA), full_precision(self.log_std_A).exp(), noise)

    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return the means."""
        _refuse_mask(mask_BM)
        return full_precision(outputs_BA)

    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        """Return the log-probability of ``actions`` and the entropy, sum_i [ log_std_i + (1 + log(2 pi)) / 2 ]."""
        _refuse_mask(mask_BM)
        mean_BA, log_std_A = full_precision(outputs_BA), full_precision(self.log_std_A)
        entropy = log_std_A.sum() + self.num_outputs * (0.5 + HALF_LOG_TWO_PI)
        return Evaluation(self._log_prob(mean_BA, log_std_A, actions), entropy.expand(len(mean_BA), 1))

    def kl(
        self,
        outputs_old_BA: Tensor,
        outputs_new_BA: Tensor,
        mask_BM: Tensor | None = None,
        snapshot_old: Tensor | None = None,
    ) -> Tensor:
        """Return sum_i [ d_i + (exp(-2 d_i) - 1 + (old_i - new_i)^2 exp(-2 new_log_std_i)) / 2 ], ``[B]``.

        Here d_i = new_log_std_i - old_log_std_i, 0 without ``snapshot_old``.
        """
        _refuse_mask(mask_BM)
        log_std_A = full_precision(self.log_std_A)
        old_BA, new_BA = full_precision(outputs_old_BA), full_precision(outputs_new_BA)
        kl_B = 0.5 * ((old_BA - new_BA) * log_std_A.neg().exp()).square().sum(1)
        if snapshot_old is None:
            return kl_B
        widening_A = log_std_A - full_precision(snapshot_old)
        return kl_B + (widening_A + 0.5 * torch.expm1(-2 * widening_A)).sum()

    def snapshot(self) -> Tensor:
        """Return a copy of ``log_std_A``."""
        return self.log_std_A.detach().clone()

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Return ``actions`` clipped to the box."""
        return _in_box(actions.cpu().numpy(), self._space)

    def flatten_mask(self, value: object, num_envs: int) -> NDArray[np.bool_]:
        """Raise ValueError: continuous actions take no mask."""
        raise ValueError(NO_MASK)

    def check_mask(self, mask_NM: NDArray[np.bool_]) -> None:
        """Raise ValueError: continuous actions take no mask."""
        raise ValueError(NO_MASK)

    def _log_prob(self, mean_BA: Tensor, log_std_A: Tensor, actions_BA: Tensor) -> Tensor:
        squares_BH = ((actions_BA - mean_BA) * log_std_A.neg().exp()).square().sum(1, keepdim=True)
        return squares_BH * -0.5 - (log_std_A.sum() + self.num_outputs * HALF_LOG_TWO_PI)


class SquashedGaussianDistribution(ActionDistribution):
    """A Gaussian u squashed into a bounded box: a_i = low_i + (high_i - low_i) (tanh(u_i) + 1) / 2.

    What is stored and evaluated is u; its log-probability is that of a, so it includes the change of variables,
    -sum_i [ log(1 - tanh(u_i)^2) + log((high_i - low_i) / 2) ], with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which
    is exact where tanh saturates (Haarnoja et al. 2018, appendix C). The entropy is that of a, and has no closed form: it is
    a Gauss-Hermite quadrature with 8 nodes for each dimension, off by less than 0.01 nats while the standard deviation of u is
    at most 1.5, and by less than 0.11 up to 3. The KL is that of the Gaussians: squashing changes none.

    Args:
        space: A Box of floats, bounded on all sides.
        log_std_init: Start of every entry of the log standard deviations of u.

    Example:
        >>> actions = SquashedGaussianDistribution(Box(0.0, 10.0, (1,)), log_std_init=0.0)
        >>> actions.to_env(actions.mode(torch.zeros(1, 1)))
        array([[5.]], dtype=float32)
    """

    _nodes_Q: Tensor
    _weights_Q: Tensor

    def __init__(self, space: Box, log_std_init: float) -> None:
        """Wrap a Gaussian."""
        super().__init__()
        self.gaussian = GaussianDistribution(space, log_std_init)
        self.num_outputs = self.gaussian.num_outputs
        self.num_heads, self.mask_width = 1, 0
        self.action_shape, self.action_dtype = self.gaussian.action_shape, torch.float32
        self._space = space
        half_range = (space.high.astype(np.float64) - space.low) / 2
        self._log_half_range = float(np.log(half_range).sum())
        nodes_Q, weights_Q = np.polynomial.hermite_e.hermegauss(NUM_NODES)
        self.register_buffer("_nodes_Q", torch.tensor(nodes_Q, dtype=torch.float32), persistent=False)
        weights_Q = weights_Q / math.sqrt(2 * math.pi)
        self.register_buffer("_weights_Q", torch.tensor(weights_Q, dtype=torch.float32), persistent=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return standard normal numbers, one for each dimension of the action."""
        return self.gaussian.noise(shape, generator)

    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return u; see the base class."""
        return self.gaussian.draw(outputs_BA, noise, mask_BM)

    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return the mean of u: the median, not the mode, of the squashed action."""
        return self.gaussian.mode(outputs_BA, mask_BM)

    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        """Return log-probability and entropy of the squashed actions, given u as ``actions``."""
        gaussian = self.gaussian.evaluate(outputs_BA, actions, mask_BM)
        mean_BA, std_A = full_precision(outputs_BA), full_precision(self.gaussian.log_std_A).exp()
        points_BAQ = mean_BA[:, :, None] + std_A[:, None] * self._nodes_Q
        slope_BH = (_log_slope(points_BAQ) * self._weights_Q).sum((1, 2))[:, None] + self._log_half_range
        return Evaluation(gaussian.log_prob_BH - self._log_slope(actions), gaussian.entropy_BH + slope_BH)

    def kl(
        self,
        outputs_old_BA: Tensor,
        outputs_new_BA: Tensor,
        mask_BM: Tensor | None = None,
        snapshot_old: Tensor | None = None,
    ) -> Tensor:
        """Return the KL of the Gaussians under the squashing, which is that of the squashed actions."""
        return self.gaussian.kl(outputs_old_BA, outputs_new_BA, mask_BM, snapshot_old)

    def snapshot(self) -> Tensor:
        """Return a copy of the log standard deviations."""
        return self.gaussian.snapshot()

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Return the squashed actions, scaled to the box."""
        share = (np.tanh(actions.cpu().numpy()).reshape(-1, *self._space.shape) + 1) / 2
        return _in_box(self._space.low + (self._space.high - self._space.low) * share, self._space)

    def flatten_mask(self, value: object, num_envs: int) -> NDArray[np.bool_]:
        """Raise ValueError: continuous actions take no mask."""
        return self.gaussian.flatten_mask(value, num_envs)

    def check_mask(self, mask_NM: NDArray[np.bool_]) -> None:
        """Raise ValueError: continuous actions take no mask."""
        self.gaussian.check_mask(mask_NM)

    def _log_slope(self, actions_BA: Tensor) -> Tensor:
        """Return the log of how much the squashing stretches the neighbourhood of ``actions_BA``, ``[B, H]``."""
        return _log_slope(actions_BA).sum(1, keepdim=True) + self._log_half_range


def _log_slope(u: Tensor) -> Tensor:
    """Return log(1 - tanh(u)^2), finite for every finite u."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


def _in_box(values: NDArray[Any], space: Box) -> NDArray[Any]:
    clipped = np.clip(values.reshape(-1, *space.shape), space.low, space.high)
    return clipped.astype(space.dtype, copy=False)


def _refuse_mask(mask_BM: Tensor | None) -> None:
    if mask_BM is not None:
        raise ValueError(NO_MASK)
