"""Faults to inject, so that a run, a test or a benchmark can see what the governor makes of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

KINDS = {
    "nan": "one batch of inputs is all NaN: loss, gradients and running statistics of that step are poisoned",
    "spike": "the weights are damaged once by noise of three times their own size: the loss jumps and stays up",
}
_DAMAGE = 3.0


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    """One fault of a kind in ``KINDS``, at a training step >= 0."""

    step: int
    kind: str

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault written as ``kind@step``.

        Raises:
            ValueError: The text has another form, or the kind is unknown.

        Example:
            >>> Fault.parse("nan@300")
            Fault(step=300, kind='nan')
        """
        kind, _, step = text.partition("@")
        if kind not in KINDS or not step.isdecimal():
            raise ValueError(f"a fault must be written as {' or '.join(f'{name}@STEP' for name in KINDS)}, got {text!r}.")
        return cls(int(step), kind)


def poisoned(inputs: Tensor) -> Tensor:
    """Return ``inputs`` with every value NaN."""
    return torch.full_like(inputs, torch.nan)


@torch.no_grad()
def damage(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every weight of ``model``, in place: three times the tensor's own root mean square."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * (_DAMAGE * parameter.square().mean().sqrt()))
