"""What gradients and weights of a network look like layer by layer, for whoever asks: one batched reduction, read at once.

Legend: P parameters.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from morphogen.governor.gradients import tensor_norms
from morphogen.growth import GrowableModel


@dataclasses.dataclass(frozen=True)
class DebugStatistics:
    """Norms of the parameters of one network and of their gradients, of its last training step.

    Attributes:
        names: Of the parameters, as in ``named_parameters``; those of a seed hold the name of its slot.
        gradient_norms: [P], 2-norms; NaN where there is no gradient, as before the first step.
        weight_norms: [P], 2-norms.
    """

    names: tuple[str, ...]
    gradient_norms: NDArray[np.float64]
    weight_norms: NDArray[np.float64]

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Gradient norm over weight norm, [P]; infinite where all weights are 0 and the gradient is not."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.gradient_norms / self.weight_norms

    @property
    def worst(self) -> str:
        """Name of the parameter whose gradient is largest for its weights, one that is not finite before all; "" if none."""
        ratios = np.where(np.isfinite(self.gradient_norms) | np.isnan(self.gradient_norms), self.ratios, np.inf)
        known = ~np.isnan(ratios)
        return self.names[int(np.argmax(np.where(known, ratios, -np.inf)))] if known.any() else ""


def debug_statistics(model: GrowableModel) -> DebugStatistics:
    """Return the statistics of ``model`` now; nothing is changed."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    gradients = [parameter.grad for _, parameter in named]
    present = [gradient for gradient in gradients if gradient is not None]
    norms = tensor_norms([*present, *(parameter for _, parameter in named)], torch.device("cpu")).tolist()
    found, weights = iter(norms[: len(present)]), norms[len(present) :]
    gradient_norms = np.array([np.nan if gradient is None else next(found) for gradient in gradients])
    return DebugStatistics(tuple(name for name, _ in named), gradient_norms, np.array(weights))
