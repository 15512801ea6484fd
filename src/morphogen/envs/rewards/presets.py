"""Which terms there are, and which of them a preset sums."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from morphogen.envs.frames import FloatArray
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import memory_terms, potentials, terms
from morphogen.envs.rewards.config import Preset, RewardConfig
from morphogen.envs.rewards.ledger import Ledger

PureTerm = Callable[[StepRecord, RewardConfig], FloatArray]
MemoryTerm = Callable[[StepRecord, Ledger, RewardConfig], tuple[FloatArray, Ledger]]


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of a reward.

    Attributes:
        name: Its name, in logs too.
        pay: ``(record, ledger, config) -> ([N], ledger)``.
        document: Docstring of the function behind it.
        reads: The settings of a ``RewardConfig`` it depends on.
        is_shaping: Whether it adds up to nothing over an episode, discounted; else it is part of the objective.
    """

    name: str
    pay: MemoryTerm
    document: str
    reads: tuple[str, ...]
    is_shaping: bool


def _pure(term: PureTerm, *reads: str, is_shaping: bool = False) -> Term:
    def pay(record: StepRecord, ledger: Ledger, config: RewardConfig) -> tuple[FloatArray, Ledger]:
        return term(record, config), ledger

    return Term(term.__name__, pay, term.__doc__ or "", reads, is_shaping)


def _remembering(term: MemoryTerm, *reads: str, is_shaping: bool = False) -> Term:
    return Term(term.__name__, term, term.__doc__ or "", reads, is_shaping)


TERMS: Mapping[str, Term] = {
    term.name: term
    for term in (
        _pure(terms.terminal, "metric_weight", "gamma"),
        _pure(potentials.progress, "progress_share", "metric_weight", "gamma", is_shaping=True),
        _pure(potentials.stages, "stages", "gamma", is_shaping=True),
        _pure(terms.rent, "rent"),
        _pure(terms.final_rent, "rent", "gamma"),
        _pure(terms.attribution, "credit"),
        _pure(terms.attribution_at_once, "credit", "drip"),
        _remembering(memory_terms.drip, "credit", "drip"),
        _remembering(memory_terms.escrow, "credit", "escrow_max_step"),
        _pure(terms.fossils, "credit", "gamma"),
        _pure(terms.churn, "churn"),
        _pure(terms.activity, "activity_cost"),
        _pure(terms.hasty_prune, "hasty_prune"),
        _pure(terms.alpha_shock, "alpha_shock", "rent"),
        _pure(terms.loss_terminal, "loss", "gamma"),
        _remembering(memory_terms.loss_gain, "loss", "gamma", is_shaping=True),
        _pure(terms.fault, "fault_penalty", "quarantine_penalty"),
    )
}

TERMS_OF: Mapping[Preset, tuple[str, ...]] = {
    "shaped": ("terminal", "progress", "stages", "rent", "attribution", "churn", "alpha_shock", "fault"),
    "escrow": ("terminal", "progress", "stages", "rent", "escrow", "churn", "alpha_shock", "fault"),
    "basic": ("terminal", "stages", "rent", "attribution", "fault"),
    "basic_plus": ("terminal", "stages", "rent", "attribution_at_once", "drip", "fault"),
    "simplified": ("terminal", "stages", "activity", "fossils", "fault"),
    "sparse": ("terminal", "final_rent", "fault"),
    "minimal": ("terminal", "final_rent", "hasty_prune", "fault"),
    "loss": ("loss_terminal", "loss_gain", "stages", "rent", "fault"),
}


def terms_of(preset: Preset) -> tuple[Term, ...]:
    """Return what a preset sums."""
    return tuple(TERMS[name] for name in TERMS_OF[preset])


def require_effect(config: RewardConfig) -> None:
    """Check that each setting that is not at its default is read by a term of the preset.

    Raises:
        ValueError: One is not.
    """
    read = {"preset", "gamma"}.union(*(term.reads for term in terms_of(config.preset)))
    for name, field in RewardConfig.model_fields.items():
        if name not in read and getattr(config, name) != field.default:
            readers = [preset for preset in TERMS_OF if any(name in term.reads for term in terms_of(preset))]
            raise ValueError(
                f"`{name}` must be left at its default with the preset {config.preset!r}, which does not read it, got "
                f"{getattr(config, name)!r}. It has an effect with {', '.join(readers)}."
            )


def objective(paid: Mapping[str, FloatArray]) -> FloatArray:
    """Return the sum of the terms that are no shaping, [N]: what episodes are to be compared by, discounted or not.

    Shaping adds up to nothing only if discounted with its gamma; a plain sum over an episode that kept it would charge
    (1 - gamma) * phi a tick, that is, most where most was achieved.

    Args:
        paid: Term -> what it paid, as from ``Rewards.pay``.
    """
    return total(points_N for name, points_N in paid.items() if not TERMS[name].is_shaping)


def total(points: Iterable[FloatArray]) -> FloatArray:
    """Return the sum of arrays [N], one after the other: ``np.sum`` rounds otherwise for one environment than for several."""
    return functools.reduce(np.add, points)
