"""A second opinion: the distribution over factored actions written out from its definition, one action at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from morphogen.rl.actions import HeadConfig


@dataclasses.dataclass
class Enumeration:
    """All actions of heads with ``sizes``; for one row of outputs, each one's probability, by recursion over the heads."""

    sizes: Sequence[int]
    configs: Sequence[HeadConfig]
    exploration: float = 0.0

    def __post_init__(self) -> None:
        names = [config.name for config in self.configs]
        self.given = [[names.index(name) for name in config.given] for config in self.configs]
        self.conditions = [{names.index(n): allowed for n, allowed in c.relevant_when.items()} for c in self.configs]
        self.shapes = [(*(self.sizes[g] for g in given), size) for given, size in zip(self.given, self.sizes, strict=True)]
        self.num_outputs = sum(math.prod(shape) for shape in self.shapes)

    def actions(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.sizes)))

    def tables(self, flat: torch.Tensor) -> list[np.ndarray]:
        parts = np.split(flat.double().numpy(), np.cumsum([math.prod(shape) for shape in self.shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def relevant(self, action: Sequence[int], head: int) -> bool:
        deciders = self.conditions[head].items()
        return all(action[place] in allowed and self.relevant(action, place) for place, allowed in deciders)

    def row(self, action: Sequence[int], head: int, outputs: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
        """The distribution of ``head`` after the choices before it, whether relevant or not."""
        index = tuple(action[place] for place in self.given[head])
        logits = self.tables(outputs)[head][index]
        allowed = np.ones(len(logits)) if mask is None else self.tables(mask)[head][index]
        weights = np.exp(logits - logits.max()) * allowed
        if not allowed.any():
            return allowed
        return (1 - self.exploration) * weights / weights.sum() + self.exploration * allowed / allowed.sum()

    def probability(self, action: Sequence[int], outputs: torch.Tensor, mask: torch.Tensor | None = None) -> float:
        total = 1.0
        for head in range(len(self.sizes)):
            if self.relevant(action, head):
                total *= self.row(action, head, outputs, mask)[action[head]]
                continue
            index = tuple(action[place] for place in self.given[head])
            allowed = np.ones(self.sizes[head]) if mask is None else self.tables(mask)[head][index]
            total *= float(action[head] == (int(allowed.argmax()) if allowed.any() else 0))
        return total

    def probabilities(self, outputs: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
        return np.array([self.probability(action, outputs, mask) for action in self.actions()])


@pytest.fixture(scope="session")
def enumeration() -> type[Enumeration]:
    return Enumeration


@pytest.fixture
def growth_heads() -> tuple[HeadConfig, ...]:
    """Op, slot given op, blueprint given both; blueprint matters for op 1 alone, slot for all ops but 0."""
    return (
        HeadConfig(name="op"),
        HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2)}),
        HeadConfig(name="blueprint", given=("op", "slot"), relevant_when={"op": (1,)}),
    )
