"""The structure guard: a step on parameters that are not what the optimizer thinks is stopped before it corrupts memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain

import torch
from torch.nn import Parameter

from morphogen.errors import StateMismatch
from morphogen.state import TrainingState, surgery


class StructureGuard:
    """Notices at every step, by identities and shapes alone, that modules, parameters or groups changed.

    What changed is then examined whole. A change that all parts followed is taken for the new structure.
    """

    def __init__(self, state: TrainingState) -> None:
        """Remember the structure as it is; what is untracked from the start is meant to be."""
        self._state = state
        self._accepted = frozenset(state.problems(structure_only=True))
        self._remember()

    def check(self) -> bool:
        """Look at the structure, cheap while it stays, and return whether it changed.

        Raises:
            StateMismatch: The next optimizer step would step an orphan, miss a parameter, or meet a moment or gradient of
                another shape (fused optimizers then corrupt memory), with one line for each.
        """
        if self._is_as_remembered():
            return False
        problems = [line for line in self._state.problems(structure_only=True) if line not in self._accepted]
        if problems:
            raise StateMismatch(
                "the structure of the run changed behind the optimizer's back, and the next step would corrupt it. Change "
                "structure through a DynamicModel, or call `reshape()`, or `reset_moments` for what changed its shape.",
                tuple(problems),
            )
        self._remember()
        return True

    def _remember(self) -> None:
        modules = [part for model in self._state.models.values() for part in model.modules()]
        tables = [table for part in modules for table in (part.__dict__["_parameters"], part.__dict__["_modules"])]
        self._tables = tables
        self._values = self._in_tables()
        self._held = self._parameters()
        self._shapes = [parameter.shape for parameter in self._held]

    def _in_tables(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _parameters(self) -> list[Parameter]:
        return [p for optimizer in self._state.optimizers.values() for p in surgery.parameters_of(optimizer)]

    def _is_as_remembered(self) -> bool:
        return (
            same_objects(self._held, self._parameters())
            and same_objects(self._values, self._in_tables())
            and all(map(_fits, self._held, self._shapes))
        )


def same_objects(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _fits(parameter: Parameter, shape: torch.Size) -> bool:
    gradient = parameter.grad
    return parameter.shape == shape and (gradient is None or gradient.shape == shape)
