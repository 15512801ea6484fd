"""Decisions about a population: from its config, its records and the number of the decision, and from nothing else. Pure."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from morphogen.pbt.config import PBTConfig
from morphogen.pbt.records import Decision, Hyperparameters, MemberRecord, Source
from morphogen.pbt.selection import SELECTORS, drawn_from, ranked
from morphogen.pbt.spaces import Value
from morphogen.state import RandomStreams


class PBTScheduler:
    """Decides who takes over whom, and with which hyperparameters.

    It holds no members and no torch: what it says hangs on (config, records, number of decisions so far) alone. Rules that hold
    for every method: a source is better than its member by more than ``min_gap`` (so equal scores never lead to anything), is
    alive, recent and has a finite score; a member whose score is no number, or that was lost, is replaced by one of the best at
    once, and is never a source; hyperparameters that travel are those that earned the source's score.

    Args:
        config: The rules.

    Attributes:
        config: As given.
        num_decisions: Decisions so far; all that evolves.

    Example:
        >>> space = {"lr": {"kind": "log_float", "low": 1e-4, "high": 1e-1}}
        >>> config = PBTConfig(population_size=5, total_steps=100, perturbation_interval=10, hyperparameters=space)
        >>> scheduler = PBTScheduler(config)
        >>> records = [MemberRecord(member, float(member), scheduler.initial(member)) for member in range(5)]
        >>> [(decision.member, decision.sources[0].member) for decision in scheduler.decide(records)]
        [(0, 4)]
    """

    def __init__(self, config: PBTConfig) -> None:
        """Have decided nothing."""
        self.config = config
        self.num_decisions = 0
        self._streams = RandomStreams(config.seed)
        self._spaces = sorted(config.hyperparameters.items())

    def initial(self, member: int) -> dict[str, Value]:
        """Return the hyperparameters that a member starts with."""
        if not 0 <= member < self.config.population_size:
            raise ValueError(f"`member` must be in [0, {self.config.population_size}), got {member}. Places count from 0.")
        stream = self._streams.numpy("initial", member)
        return {name: space.draw(stream) for name, space in self._spaces}

    def decide(self, records: Sequence[MemberRecord], *, about: Collection[int] | None = None) -> tuple[Decision, ...]:
        """Return what is to become of members; those that simply go on are not mentioned.

        Args:
            records: Of everybody that was ever heard of, one each.
            about: The members to decide about; None for all in ``records``. The others may be sources.

        Raises:
            ValueError: Two records are of one member, or one has other hyperparameters than the config.
        """
        self._check(records)
        event, self.num_decisions = self.num_decisions, self.num_decisions + 1
        about = {record.member for record in records} if about is None else set(about)
        order = ranked(self.config, records)
        chosen = self._chosen(records, order, event)
        protected = {record.member for record in order[: self.config.elite]}
        decisions: list[Decision] = []
        for record in sorted(records, key=lambda record: record.member):
            if record.member not in about or record.member in protected:
                continue
            reason, sources = chosen.get(record.member, ("", []))
            if sources:
                decisions.append(self._decision(event, record, reason, sources))
            elif self.config.explore_all and record.is_sound:
                decisions.append(self._decision(event, record, "explore", [record]))
        return tuple(decisions)

    def state_dict(self) -> dict[str, Any]:
        """Return all that evolves."""
        return {"num_decisions": self.num_decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.num_decisions = int(state["num_decisions"])

    # -- parts of a decision ----------------------------------------------------------------------------------------

    def _chosen(
        self, records: Sequence[MemberRecord], order: Sequence[MemberRecord], event: int
    ) -> dict[int, tuple[str, Sequence[MemberRecord]]]:
        """Return a reason and sources for each member that takes another one over."""
        draw = functools.partial(self._stream, "select", event)
        found = SELECTORS[self.config.exploit_method](self.config, order, draw)
        steps = {record.member: record.step for record in records}
        ready = {member: sources for member, sources in found.items() if steps[member] >= self.config.burn_in}
        chosen: dict[int, tuple[str, Sequence[MemberRecord]]] = {m: ("worse", sources) for m, sources in ready.items()}
        if self.config.exploit_method != "none":
            for record in records:
                if not record.is_sound:
                    chosen[record.member] = ("not finite" if record.is_alive else "lost", self._rescuers(record, order, draw))
        return chosen

    def _rescuers(self, record: MemberRecord, order: Sequence[MemberRecord], draw: Any) -> list[MemberRecord]:
        """Return sources for a member that is of no use: one of the best, drawn evenly, then the others from the best on."""
        sources = [other for other in order if other.is_recent]
        if not sources:
            return []
        best = max(1, self.config.num_exploited if self.config.exploit_method == "truncation" else 1)
        drawn = drawn_from(sources[:best], draw, record.member)
        return [drawn, *(other for other in sources if other is not drawn)]

    def _decision(self, event: int, record: MemberRecord, reason: str, sources: Sequence[MemberRecord]) -> Decision:
        explores = self.config.explore_method != "none"
        stream = self._stream("explore", event, record.member) if explores else None
        return Decision(
            event=event,
            member=record.member,
            reason=reason,
            score=record.score,
            hyperparameters=dict(record.hyperparameters),
            sources=tuple(self._source(source, stream) for source in sources),
        )

    def _source(self, source: MemberRecord, stream: np.random.Generator | None) -> Source:
        values, moves = (dict(source.hyperparameters), {}) if stream is None else self._explored(source.hyperparameters, stream)
        return Source(source.member, source.step, source.score, values, moves)

    def _explored(self, before: Hyperparameters, stream: np.random.Generator) -> tuple[dict[str, Value], dict[str, str]]:
        """Return hyperparameters near ``before`` and how each moved."""
        method, values, moves = self.config.explore_method, dict(before), dict[str, str]()
        for name, space in self._spaces:
            anew = method == "resample" or (method == "both" and stream.random() < self.config.resample_probability)
            values[name] = space.resample(stream) if anew else space.perturb(before[name], stream)
            moves[name] = "resampled" if anew else "perturbed"
        return values, moves

    def _stream(self, *name: str | int) -> np.random.Generator:
        return self._streams.numpy(*name)

    def _check(self, records: Sequence[MemberRecord]) -> None:
        members = [record.member for record in records]
        twice = [member for place, member in enumerate(members) if member in members[:place]]
        if twice:
            raise ValueError(f"`records` must hold each member once, got {twice[0]} twice. Give the latest of each.")
        for record in records:
            self.config.check_values(dict(record.hyperparameters), f"member {record.member}")
