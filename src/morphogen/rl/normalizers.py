"""Running normalisers of observations, rewards and returns: part of a run's state, updated in rollouts alone.

Statistics are exact over all valid rows ever seen: count, mean and sum of squared deviations in float64, merged batch by
batch (Chan, Golub & LeVeque 1983). A freshly made normaliser is the identity but for clipping, and so is one that has seen
no variation: it divides by 1, not by almost nothing. Evaluation freezes a normaliser by not calling ``update``.

Shapes: N environments or rows, D flat observation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.errors import StateMismatch

Floats: TypeAlias = NDArray[np.floating[Any]]
Bools: TypeAlias = NDArray[np.bool_]
State: TypeAlias = Mapping[str, Any]


@final
class RunningMoments:
    """Count, mean and variance of all rows seen, per entry, in float64.

    ``mean_D`` and ``squares_D`` (the sum of squared deviations from the mean) are the live arrays; treat them as read-only.

    Args:
        width: Entries per row, D.

    Example:
        >>> moments = RunningMoments(1)
        >>> moments.update(np.array([[1.0], [2.0]]))
        >>> moments.update(np.array([[6.0]]))
        >>> moments.count, moments.mean_D, moments.variance_D()
        (3, array([3.]), array([4.66666667]))
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"`width` must be at least 1, got {width}. Pass the number of entries per row.")
        self.count = 0
        self.mean_D = np.zeros(width)
        self.squares_D = np.zeros(width)

    def update(self, rows_ND: Floats) -> None:
        """Take in ``rows_ND``: the same result, up to rounding, as seeing all rows ever given at once.

        Raises:
            ValueError: A row holds NaN or infinity; nothing is changed then.
        """
        rows = len(rows_ND)
        if rows == 0:
            return
        # Deviations from a point near the data: the sums of squares below then cancel no digits.
        near_D = self.mean_D if self.count else rows_ND[0].astype(np.float64)
        count = self.count + rows
        deviation_ND = rows_ND - near_D
        sum_D = np.add.reduce(deviation_ND, axis=0)
        deviation_ND *= deviation_ND
        squares_D = np.add.reduce(deviation_ND, axis=0)
        if not math.isfinite(np.add.reduce(squares_D)):
            raise ValueError("rows must be finite, got NaN or infinity. Check the environment's observations and rewards.")
        self.count = count
        self.mean_D = near_D + sum_D / count
        self.squares_D = np.maximum(self.squares_D + squares_D - sum_D * sum_D / count, 0.0)

    def variance_D(self) -> NDArray[np.float64]:
        """Return the variance of all rows seen (divided by their count), a new array [D]; 1 before the first row."""
        return self.squares_D / self.count if self.count else np.ones_like(self.squares_D)

    def merge(self, other: RunningMoments) -> None:
        """Take in all rows that ``other`` has seen; ``other`` is not changed. ValueError if the widths differ."""
        if other.mean_D.shape != self.mean_D.shape:
            raise ValueError(f"`other` must have width {len(self.mean_D)}, got {len(other.mean_D)}. Merge like with like.")
        if other.count == 0:
            return
        count = self.count + other.count
        gap_D = other.mean_D - self.mean_D
        self.squares_D = self.squares_D + other.squares_D + gap_D * gap_D * (self.count * other.count / count)
        self.mean_D = self.mean_D + gap_D * (other.count / count)
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        """Return ``count``, ``mean`` and ``squares``, the arrays copied."""
        return {"count": self.count, "mean": self.mean_D.copy(), "squares": self.squares_D.copy()}

    def load_state_dict(self, state: State) -> None:
        """Take over copies of what :meth:`state_dict` returned; StateMismatch, and no change, if it does not fit."""
        count, mean_D, squares_D = checked_moments(state, self.mean_D.shape)
        if count != int(count):
            raise StateMismatch(f"`count` must be a whole number, got {count}. The state was not written by this class.")
        self.count, self.mean_D, self.squares_D = int(count), mean_D, squares_D


def checked_moments(state: State, shape: tuple[int, ...]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return count, mean and squares of ``state`` as fresh float64 copies; StateMismatch lists all that does not fit."""
    check_names(state, required=("count", "mean", "squares"))
    count = float(state["count"])
    arrays = {name: _array(state[name]) for name in ("mean", "squares")}
    problems = [f"`{name}` is {value.shape}, expected {shape}" for name, value in arrays.items() if value.shape != shape]
    problems += [f"`{name}` is not finite" for name, value in arrays.items() if not np.isfinite(value).all()]
    if not (math.isfinite(count) and count >= 0):
        problems.append(f"`count` is {count}, expected a number >= 0")
    if (arrays["squares"] < 0).any():
        problems.append("`squares` holds negative sums of squares")
    if problems:
        raise StateMismatch("the statistics do not fit this normaliser; nothing was changed.", tuple(problems))
    return count, arrays["mean"], arrays["squares"]


def _array(value: Any) -> NDArray[np.float64]:
    return np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def check_names(state: State, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """StateMismatch unless ``state`` holds every ``required`` name and else only ``optional`` ones."""
    problems = [f"`{name}` is missing" for name in required if name not in state]
    problems += [f"`{name}` is unknown" for name in state if name not in (*required, *optional)]
    if problems:
        raise StateMismatch("the state was not written by this class; nothing was changed.", tuple(problems))


def scale_of(variance: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """Return ``1 / sqrt(variance + epsilon)``, and 1 where ``variance`` is 0: what never varied is left at its size."""
    return np.where(variance > 0.0, 1.0 / np.sqrt(variance + epsilon), 1.0)


@final
class ObservationNormalizer:
    """Shifts and scales observations to mean 0 and standard deviation 1, entry by entry.

    ``normalized = clamp((observation - mean) / sqrt(variance + epsilon), -clip, clip)``; an entry that never varied is only
    shifted and clamped.

    Args:
        width: Entries of a flat observation, D.
        normalizable_D: Booleans; an entry with False (one-hot, binary) passes through untouched and unclamped. None: all True.
        clip: Largest magnitude that comes out, > 0, in standard deviations.
        epsilon: Added to the variance, > 0.

    Example:
        >>> normalizer = ObservationNormalizer(2, np.array([True, False]))
        >>> normalizer.update(np.array([[0.0, 1.0], [4.0, 1.0]], dtype=np.float32))
        >>> normalizer.normalize(np.array([[4.0, 1.0], [100.0, 1.0]], dtype=np.float32))
        array([[ 1.,  1.],
               [10.,  1.]], dtype=float32)

    Source: as VecNormalize of Stable-Baselines3 and NormalizeObservation of Gymnasium, which start from a made-up sample of
    weight 1e-4; here there is none, so the statistics are those of the data alone.
    """

    def __init__(self, width: int, normalizable_D: Bools | None = None, *, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        check_positive(clip=clip, epsilon=epsilon)
        moments = RunningMoments(width)
        chosen_D = np.ones(width, dtype=bool) if normalizable_D is None else np.array(normalizable_D, dtype=bool)
        if chosen_D.shape != (width,):
            raise ValueError(f"`normalizable_D` must have shape ({width},), got {chosen_D.shape}. Give one flag per entry.")
        self.moments = moments
        self.epsilon = epsilon
        self._kept_D = None if chosen_D.all() else ~chosen_D
        self._high_D = np.where(chosen_D, clip, np.inf)
        self._refresh()

    def update(self, observation_ND: Floats, valid_N: Bools | None = None) -> None:
        """Take in the rows of ``observation_ND`` where ``valid_N`` (None: all). ValueError if one of them is not finite."""
        self.moments.update(observation_ND if valid_N is None else observation_ND[valid_N])
        self._refresh()

    def normalize(self, observation_ND: Floats) -> NDArray[np.float32]:
        """Return ``observation_ND`` (any leading shape, last dimension D) normalised: a new float32 array."""
        normalized_ND = observation_ND - self._shift_D
        normalized_ND *= self._scale_D
        np.minimum(normalized_ND, self._high_D, out=normalized_ND)
        np.maximum(normalized_ND, -self._high_D, out=normalized_ND)
        return normalized_ND.astype(np.float32)

    def merge(self, other: ObservationNormalizer) -> None:
        """Take in all that ``other`` has seen; ``other`` is not changed. ValueError if the widths differ."""
        self.moments.merge(other.moments)
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics (``count``, ``mean``, ``squares``), copied; ``clip`` and the like are not state."""
        return self.moments.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over copies of what :meth:`state_dict` returned; StateMismatch, and no change, if it does not fit."""
        self.moments.load_state_dict(state)
        self._refresh()

    def _refresh(self) -> None:
        """Shift and scale are needed at every step of every environment, the moments only here."""
        self._shift_D, self._scale_D = self.moments.mean_D, scale_of(self.moments.variance_D(), self.epsilon)
        if self._kept_D is not None:
            self._shift_D = np.where(self._kept_D, 0.0, self._shift_D)
            self._scale_D[self._kept_D] = 1.0


@final
class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, so that their scale is that of a return.

    Each environment accumulates ``return = gamma * return + reward``; every valid step's return enters the statistics, and
    ``normalized = clamp(reward / sqrt(variance + epsilon), -clip, clip)``. The mean is not subtracted: that would change
    which policy is best. While no return has differed from another, rewards are only clamped.

    Args:
        num_envs: Environments, N.
        clip: Largest magnitude that comes out, > 0.
        epsilon: Added to the variance, > 0.

    Example:
        >>> normalizer = RewardNormalizer(2)
        >>> reward_N = np.array([0.0, 4.0], dtype=np.float32)
        >>> normalizer.update(reward_N, ended_N=np.array([False, True]), gamma=0.99)
        >>> normalizer.normalize(reward_N)
        array([0., 2.], dtype=float32)

    Source: as VecNormalize of Stable-Baselines3; gamma comes with each call, since it may change while a run lives.
    """

    def __init__(self, num_envs: int, *, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        if num_envs < 1:
            raise ValueError(f"`num_envs` must be at least 1, got {num_envs}. Pass the number of environments.")
        check_positive(clip=clip, epsilon=epsilon)
        self.moments = RunningMoments(1)
        self.clip, self.epsilon = clip, epsilon
        self._return_N = np.zeros(num_envs)
        self._scale = 1.0

    def begin_anew(self) -> None:
        """Every environment begins an episode; statistics stay."""
        self._return_N = np.zeros_like(self._return_N)

    def update(self, reward_N: Floats, ended_N: Bools, gamma: float, valid_N: Bools | None = None) -> None:
        """Take in one step of every environment: its raw reward, and whether it ended (terminated or truncated) the episode.

        Rows where ``valid_N`` is False (None: all are valid) change nothing. ValueError if a valid reward is not finite.
        """
        if valid_N is None or valid_N.all():
            return_N = self._return_N * gamma + reward_N
            self.moments.update(return_N[:, None])
            return_N[ended_N] = 0.0
        else:
            return_N = np.where(valid_N, self._return_N * gamma + np.where(valid_N, reward_N, 0.0), self._return_N)
            self.moments.update(return_N[valid_N, None])
            return_N[ended_N & valid_N] = 0.0
        self._return_N = return_N
        self._refresh()

    def update_and_normalize(
        self, reward_N: Floats, ended_N: Bools, gamma: float, valid_N: Bools | None = None
    ) -> NDArray[np.float32]:
        """Return ``normalize(reward_N)`` after ``update`` with the same arguments: one step of a rollout."""
        self.update(reward_N, ended_N, gamma, valid_N)
        return self.normalize(reward_N)

    def normalize(self, reward_N: Floats) -> NDArray[np.float32]:
        """Return ``reward_N`` (any shape) divided by the standard deviation and clamped: a new float32 array."""
        normalized_N = np.multiply(reward_N, self._scale, dtype=np.float64)
        np.minimum(normalized_N, self.clip, out=normalized_N)
        np.maximum(normalized_N, -self.clip, out=normalized_N)
        return normalized_N.astype(np.float32)

    def merge(self, other: RewardNormalizer) -> None:
        """Take in all returns that ``other`` has seen; ``other`` and the episodes under way are not changed."""
        self.moments.merge(other.moments)
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and the ``returns`` of the episodes under way, arrays copied: all that resuming needs."""
        return {**self.portable_state_dict(), "returns": self._return_N.copy()}

    def portable_state_dict(self) -> dict[str, Any]:
        """Return the statistics alone, copied: what travels to another run, whose episodes are not ours."""
        return self.moments.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over copies of what :meth:`state_dict` returned; without ``returns``, those of the episodes under way stay.

        Raises:
            StateMismatch: A name, shape or value does not fit; nothing is changed.
        """
        statistics = {name: value for name, value in state.items() if name != "returns"}
        return_N = np.array(state.get("returns", self._return_N), dtype=np.float64)
        if return_N.shape != self._return_N.shape or not np.isfinite(return_N).all():
            raise StateMismatch(
                f"`returns` must be {len(self._return_N)} finite numbers, one per environment, got {return_N.tolist()}. Use as "
                "many environments as the run that was saved, or leave `returns` out to keep those under way."
            )
        self.moments.load_state_dict(statistics)
        self._return_N = return_N
        self._refresh()

    def _refresh(self) -> None:
        variance = float(self.moments.variance_D()[0])
        self._scale = 1.0 / math.sqrt(variance + self.epsilon) if variance > 0.0 else 1.0


@final
class ValueNormalizer:
    """Maps returns to the critic's frame, mean 0 and standard deviation 1, and the critic's values back to returns.

    ``normalized = (return - mean) / std`` and ``return = normalized * std + mean``, with ``std = sqrt(variance + epsilon)``
    (1 while no return has differed from another). Nothing is clamped: the two are each other's inverse. Everything stays
    on ``device``, and nothing waits for it.

    A call of :meth:`update` changes what the critic's outputs mean: values computed before it must be denormalised before
    it, and targets normalised after it.

    Args:
        decay: Factor in (0, 1] on the weight of all earlier returns at each update; 1 keeps all of history alike.
        epsilon: Added to the variance, > 0.
        device: Where the statistics live.

    Example:
        >>> normalizer = ValueNormalizer()
        >>> normalizer.update(torch.tensor([0.0, 4.0]))
        >>> normalizer.normalize(torch.tensor([0.0, 2.0, 4.0]))
        tensor([-1.,  0.,  1.])
        >>> normalizer.denormalize(torch.tensor([1.0]))
        tensor([4.])

    Source: the normalisation of PopArt (van Hasselt et al. 2016, section 2), without its rescaling of the critic's last layer.
    """

    def __init__(self, *, decay: float = 1.0, epsilon: float = 1e-8, device: torch.device | str = "cpu") -> None:
        check_positive(epsilon=epsilon)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"`decay` must be in (0, 1], got {decay}. Pass 1 to keep all of history alike.")
        self.decay, self.epsilon = decay, epsilon
        self._device = torch.device(device)
        self._set(*(torch.zeros((), dtype=torch.float64, device=self._device) for _ in range(3)))

    def update(self, returns: Tensor, valid: Tensor | None = None) -> None:
        """Take in ``returns`` (any shape) where ``valid`` (bool, of a shape that broadcasts to theirs; None: all of them).

        Returns that are not finite poison the statistics: skip the update where there may be any.
        """
        values = returns.detach().to(torch.float64)
        weights = torch.ones_like(values) if valid is None else valid.to(torch.float64).expand_as(values)
        values = values if valid is None else values.where(valid, 0.0)
        rows = weights.sum()
        mean = values.sum() / rows.clamp(min=1.0)
        squares = ((values - mean).square() * weights).sum()
        held = self._count * self.decay
        count = held + rows
        share = rows / count.clamp(min=1e-300)
        gap = mean - self._mean
        self._set(count, self._mean + gap * share, self._squares * self.decay + squares + gap * gap * held * share)

    def normalize(self, returns: Tensor) -> Tensor:
        """Return ``returns`` in the critic's frame: a new float32 tensor of the same shape."""
        return (returns.float() - self._shift) / self._std

    def denormalize(self, values: Tensor) -> Tensor:
        """Return ``values`` of the critic as returns: a new float32 tensor of the same shape."""
        return values.float() * self._std + self._shift

    def state_dict(self) -> dict[str, Any]:
        """Return ``count``, ``mean`` and ``squares`` as float64 tensors of shape [], copied; ``decay`` is not state."""
        return {"count": self._count.clone(), "mean": self._mean.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: State) -> None:
        """Take over copies of what :meth:`state_dict` returned; StateMismatch, and no change, if it does not fit."""
        loaded = checked_moments(state, ())
        self._set(*(torch.tensor(float(value), dtype=torch.float64, device=self._device) for value in loaded))

    def _set(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        self._count, self._mean, self._squares = count, mean, squares
        variance = squares / count.clamp(min=1e-300)
        self._shift = mean.float()
        self._std = torch.where(variance > 0.0, (variance + self.epsilon).sqrt(), 1.0).float()


def check_positive(**fields: float) -> None:
    """ValueError naming the first of ``fields`` that is not a finite number > 0."""
    for name, value in fields.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"`{name}` must be a finite number > 0, got {value}. Change it.")
