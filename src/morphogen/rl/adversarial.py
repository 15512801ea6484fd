"""State-adversarial training: the policy is kept from changing under the worst small change of its observation.

The attack :func:`perturb` climbs a divergence that the caller computes, usually ``KL(policy(observation) ||
policy(perturbed))``, within a ball around each observation. The robust loss is the mean of the same divergence over the
same rows, with gradient to both sides. A recurrent caller's divergence runs the unroll, on observations ``[L, B, D]``.

Shapes: L steps of a sequence, B rows, D flat observation. Everything but the last dimension of an observation is rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from morphogen.config import Config
from morphogen.rl.schedules import Schedule, check_schedule, resolve


class AdversarialConfig(Config):
    """How strong the attack is, and how much robustness counts.

    Attributes:
        epsilon: Radius of the ball, >= 0, in units of the observations that the network sees (standard deviations if they are
            normalised); a number or a schedule. 0 is no attack.
        steps: Steps of gradient ascent; 1 is FGSM, more is PGD.
        step_ratio: Length of a step, as a part of ``epsilon``; None: ``2.5 / steps``, which reaches every corner of the ball
            from wherever it starts.
        norm: "linf": no entry moves by more than epsilon. "l2": no row moves by more than epsilon in Euclidean norm.
        coefficient: Weight of the robust loss, >= 0; a number or a schedule.
    """

    epsilon: Schedule = 0.075
    steps: int = Field(default=3, ge=1)
    step_ratio: float | None = Field(default=None, gt=0)
    norm: Literal["linf", "l2"] = "linf"
    coefficient: Schedule = 0.1

    @field_validator("epsilon", "coefficient")
    @classmethod
    def _never_negative(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        check_schedule(schedule, field=str(info.field_name), minimum=0.0)
        return schedule

    def epsilon_at(self, fraction: float) -> float:
        """Return the radius when ``fraction`` of training (in [0, 1]) is done, from the schedule in closed form."""
        return resolve(self.epsilon, fraction, field="epsilon", minimum=0.0)

    def coefficient_at(self, fraction: float) -> float:
        """Return the weight of the robust loss when ``fraction`` of training (in [0, 1]) is done."""
        return resolve(self.coefficient, fraction, field="coefficient", minimum=0.0)


def starting_noise(observation_BD: Tensor, generator: torch.Generator) -> Tensor:
    """Return the chance of one attack on ``observation_BD``: uniform in [-1, 1), of its shape, dtype and device."""
    shape, dtype, device = observation_BD.shape, observation_BD.dtype, observation_BD.device
    return torch.rand(shape, generator=generator, dtype=dtype, device=device).mul_(2.0).sub_(1.0)


def perturb(
    divergence: Callable[[Tensor], Tensor],
    observation_BD: Tensor,
    epsilon: float,
    config: AdversarialConfig,
    noise_BD: Tensor,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """Return observations within ``epsilon`` of ``observation_BD`` at which ``divergence`` is (locally) largest.

    Starts at the projection of ``observation_BD + epsilon * noise_BD`` and makes ``config.steps`` steps up the divergence of
    each row: ``x <- project(x + step * direction)``, where the direction is ``sign(gradient)`` ("linf") or ``gradient /
    |gradient|`` ("l2"). It never starts at the observation itself, where a divergence from the clean policy has its minimum
    and no slope.

    The gradient is taken with respect to observations alone: no parameter's ``.grad`` is read or written.

    Args:
        divergence: Maps perturbed observations (shape of ``observation_BD``) to numbers of any shape, whose sum is climbed:
            one per row. What it holds fixed, like the clean policy's outputs, should be detached.
        observation_BD: Clean observations, ``[..., D]``; not changed.
        epsilon: Radius of the ball now, >= 0: ``config.epsilon_at(fraction)``. 0 gives back a copy.
        config: ``steps``, ``step_ratio`` and ``norm``.
        noise_BD: Where in the ball to start, entries in [-1, 1]: :func:`starting_noise`.
        low: Smallest values of an entry, broadcast to the observations; a clean value below it may stay. ``low = high =
            observation`` holds an entry still.
        high: Largest values of an entry, likewise.

    Returns:
        A new tensor without gradient, of the shape, dtype and device of ``observation_BD``.

    Raises:
        ValueError: ``epsilon`` is negative or not finite, or the noise has another shape than the observations.

    Example:
        >>> weight_D = torch.tensor([3.0, -1.0])
        >>> clean_BD = torch.zeros(1, 2)
        >>> noise_BD = torch.tensor([[0.1, 0.1]])
        >>> perturb(lambda x_BD: (x_BD @ weight_D) ** 2, clean_BD, 0.5, AdversarialConfig(steps=1), noise_BD)
        tensor([[ 0.5000, -0.5000]])

    Source: Zhang et al. 2020 (SA-MDP), section 3.2 and appendix: they use SGLD or convex relaxation to maximise; here it is
    PGD from a random start (Madry et al. 2018), with FGSM as one step of it (Wong et al. 2020).
    """
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ValueError(f"`epsilon` must be a finite number >= 0, got {epsilon}. Pass config.epsilon_at(fraction).")
    if noise_BD.shape != observation_BD.shape:
        raise ValueError(
            f"`noise_BD` must have the observations' shape {tuple(observation_BD.shape)}, got {tuple(noise_BD.shape)}. Draw it "
            "with starting_noise."
        )
    clean_BD = observation_BD.detach()
    if epsilon == 0.0:
        return clean_BD.clone()
    low = None if low is None else torch.minimum(low, clean_BD)
    high = None if high is None else torch.maximum(high, clean_BD)
    project = _PROJECTIONS[config.norm]

    def placed(offset_BD: Tensor) -> Tensor:
        moved_BD = clean_BD + project(offset_BD, epsilon)
        return moved_BD if low is None and high is None else moved_BD.clamp(low, high)

    step = epsilon * (2.5 / config.steps if config.step_ratio is None else config.step_ratio)
    perturbed_BD = placed(noise_BD * epsilon)
    for _ in range(config.steps):
        ascent_BD = _DIRECTIONS[config.norm](_slope(divergence, perturbed_BD))
        perturbed_BD = placed(perturbed_BD - clean_BD + step * ascent_BD)
    return perturbed_BD


def _slope(divergence: Callable[[Tensor], Tensor], observation_BD: Tensor) -> Tensor:
    with torch.enable_grad():
        point_BD = observation_BD.detach().requires_grad_()
        (slope_BD,) = torch.autograd.grad(divergence(point_BD).sum(), point_BD)
    return slope_BD


def _onto_sphere(vector_BD: Tensor) -> Tensor:
    """Scale by the largest entry first: squares of slopes near 1e-30 are 0 in float32."""
    scaled_BD = vector_BD / vector_BD.abs().amax(-1, keepdim=True).clamp(min=1e-37)
    return scaled_BD / torch.linalg.vector_norm(scaled_BD, dim=-1, keepdim=True).clamp(min=1e-12)


def _into_ball(offset_BD: Tensor, epsilon: float) -> Tensor:
    return offset_BD * (epsilon / torch.linalg.vector_norm(offset_BD, dim=-1, keepdim=True).clamp(min=epsilon))


def _into_cube(offset_BD: Tensor, epsilon: float) -> Tensor:
    return offset_BD.clamp(-epsilon, epsilon)


_DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"linf": torch.sign, "l2": _onto_sphere}
_PROJECTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {"linf": _into_cube, "l2": _into_ball}
