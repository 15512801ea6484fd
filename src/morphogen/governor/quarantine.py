"""Quarantine: a part of a model that does not act yet and is not finite is taken out; nothing else of the run is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn import Parameter

from morphogen.governor.consensus import Consensus
from morphogen.state.inventory import all_finite
from morphogen.state.topology import Isolating


def isolated_parameters(models: Iterable[Isolating]) -> list[Parameter]:
    """Return the parameters of all parts that do not act on the outputs of their model."""
    return [parameter for model in models for pairs in model.isolated().values() for _, parameter in pairs]


def quarantine_faulty(models: Mapping[str, nn.Module], consensus: Consensus, *, by_gradient: bool) -> list[str]:
    """Take out every isolated part with weights that are not finite, and return the owners; for the moment of a fault.

    Args:
        models: The models of the run, changed in place.
        consensus: A part is taken out of every process if it is at fault in one.
        by_gradient: Whether gradients that are not finite are enough; not while a gradient scaler seeks its scale.
    """
    isolating = [(model, model.isolated()) for model in models.values() if isinstance(model, Isolating)]
    suspects = [(model, owner, pairs) for model, owners in isolating for owner, pairs in owners.items()]
    faulty = consensus.any(_is_faulty([parameter for _, parameter in pairs], by_gradient) for _, _, pairs in suspects)
    chosen = [(model, owner) for (model, owner, _), is_faulty in zip(suspects, faulty, strict=True) if is_faulty]
    for model, owner in chosen:
        model.quarantine(owner, "not finite")
    return [owner for _, owner in chosen]


def _is_faulty(parameters: list[Parameter], by_gradient: bool) -> bool:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None] if by_gradient else []
    return not all_finite([*parameters, *gradients])
