"""A population while it trains: who is how far, and how decisions are carried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from morphogen.pbt.config import PBTConfig
from morphogen.pbt.engines.base import Engine, Parcel
from morphogen.pbt.engines.hosting import Birth, Outcome, Succession
from morphogen.pbt.events import MemberExploited, MemberLost, MemberReported, SourceRefused
from morphogen.pbt.history import Exploit, MemberReport
from morphogen.pbt.records import Decision, Hyperparameters, MemberRecord, Source
from morphogen.pbt.scheduler import PBTScheduler
from morphogen.pbt.strategies import Strategy, text_of
from morphogen.state import RandomStreams
from morphogen.telemetry.events import Emit


@dataclasses.dataclass
class Place:
    """A place in the population, and who holds it now.

    Attributes:
        member: Its number.
        hyperparameters: In use.
        seed: Of its chance.
        step: How far the lineage has come.
        interval: Intervals done.
        report: Of the last one.
        is_lost: Whether there is nobody who could train.
    """

    member: int
    hyperparameters: Hyperparameters
    seed: int
    step: int = 0
    interval: int = 0
    report: MemberReport | None = None
    is_lost: bool = False


class Population:
    """The places, and what is done to those who hold them.

    Args:
        config: The rules.
        engine: Where members live.
        emit: Receives events.

    Attributes:
        scheduler: Decides.
        places: One for each member.
    """

    def __init__(self, config: PBTConfig, engine: Engine, emit: Emit) -> None:
        """Know where everybody begins; nobody is made yet."""
        self.scheduler = PBTScheduler(config)
        self._config, self._engine, self._emit = config, engine, emit
        streams = RandomStreams(config.seed)
        self.places = [
            Place(member, self.scheduler.initial(member), streams.integer("member", member))
            for member in range(config.population_size)
        ]

    def births(self) -> list[Birth]:
        """Return how everybody begins from nothing."""
        return [Birth(place.member, place.hyperparameters, place.seed) for place in self.places]

    def begin(self, births: Sequence[Birth]) -> None:
        """Make members; those that cannot be made are lost, until they take over another one."""
        problems = self._engine.begin(births)
        for birth in births:
            place, problem = self.places[birth.member], problems.get(birth.member, "")
            place.is_lost = bool(problem)
            if problem:
                self._emit(MemberLost(step=place.step, member=place.member, interval=place.interval, problem=problem))

    def target(self, place: Place) -> int:
        """Return up to which step a member trains next."""
        done = place.interval * self._config.perturbation_interval
        return place.step + min(self._config.perturbation_interval, self._config.total_steps - done)

    def is_done(self, place: Place) -> bool:
        """Return whether a place has all its intervals behind it."""
        return place.interval >= self._config.num_intervals

    def reported(self, outcome: Outcome, snapshot: str | None = None) -> MemberReport:
        """Note what came of an order to train, and return it."""
        place = self.places[outcome.member]
        trained = outcome.trained
        place.interval += 1
        place.step = outcome.until
        place.is_lost = trained is None
        place.report = report = MemberReport(
            member=place.member,
            interval=place.interval,
            step=place.step,
            score=float("nan") if trained is None else trained.score,
            scores=() if trained is None else trained.scores,
            metrics={} if trained is None else trained.metrics,
            hyperparameters=place.hyperparameters,
            seed=place.seed,
            problem=outcome.problem,
            cpu_seconds=outcome.seconds,
            snapshot=snapshot,
        )
        self._announce(report)
        return report

    def went_on_from(self, report: MemberReport) -> None:
        """Put a place to where ``report`` says that it was."""
        place = self.places[report.member]
        place.interval, place.step, place.seed = report.interval, report.step, report.seed
        place.hyperparameters, place.report, place.is_lost = report.hyperparameters, report, bool(report.problem)

    def records(self) -> list[MemberRecord]:
        """Return everybody that reported as the scheduler sees them."""
        most = max(place.interval for place in self.places)
        return [
            dataclasses.replace(
                place.report.record(is_recent=most - place.interval <= _RECENT_INTERVALS), is_alive=not place.is_lost
            )
            for place in self.places
            if place.report is not None
        ]

    def _announce(self, report: MemberReport) -> None:
        where: Any = {"step": report.step, "member": report.member, "interval": report.interval}
        if report.problem:
            self._emit(MemberLost(**where, problem=report.problem))
            return
        facts: Any = {"score": report.score, "hyperparameters": report.hyperparameters, "metrics": report.metrics}
        self._emit(MemberReported(**where, **facts, cpu_seconds=report.cpu_seconds))

    # -- carrying out decisions -------------------------------------------------------------------------------------

    def carry_out(self, decisions: Sequence[Decision]) -> list[Exploit]:
        """Do what was decided, and return what was done: sources are as they were before any of it."""
        changing = {decision.member for decision in decisions}
        parcels = _Parcels(self._engine, self._config, decisions, changing)
        done: list[Exploit] = []
        for decision in decisions:
            exploit = self._explore(decision) if not decision.is_exploit else self._exploit(decision, parcels, changing)
            if exploit is not None:
                done.append(exploit)
                self._emit(_event_of(exploit))
        return done

    def _explore(self, decision: Decision) -> Exploit | None:
        source, place = decision.sources[0], self.places[decision.member]
        problem = self._engine.explore(decision.member, source.hyperparameters)
        if problem:
            place.is_lost = True
            self._emit(MemberLost(step=place.step, member=place.member, interval=place.interval, problem=problem))
            return None
        place.hyperparameters = source.hyperparameters
        return self._done(decision, source, place.seed, [])

    def _exploit(self, decision: Decision, parcels: _Parcels, changing: set[int]) -> Exploit | None:
        place = self.places[decision.member]
        refused: list[tuple[int, str]] = []
        try:
            for rank, source in enumerate(decision.sources):
                if rank and source.member in changing:
                    continue  # no longer what it was when it scored
                seed = self.seed_after(decision, self.places[source.member].seed)
                problem = self._taken_over(place, source, seed, parcels)
                if not problem:
                    exploit = self._done(decision, source, seed, refused)
                    place.hyperparameters, place.seed, place.step = source.hyperparameters, seed, source.step
                    place.is_lost = False
                    return exploit
                refused.append((source.member, problem))
                self._emit(SourceRefused(step=place.step, member=place.member, source=source.member, reason=problem))
        finally:
            parcels.used(decision)
        return None

    def _taken_over(self, place: Place, source: Source, seed: int, parcels: _Parcels) -> str:
        parcel = parcels.of(source.member)
        if parcel is None:
            return "its parameters are lost"
        if place.is_lost:
            problem = self._engine.begin([Birth(place.member, place.hyperparameters, place.seed)]).get(place.member, "")
            if problem:
                return problem
            place.is_lost = False
        order = Succession(place.member, source.hyperparameters, seed, self._config.optimizer_exploit_strategy)
        return self._engine.take_over(order, parcel)

    @staticmethod
    def seed_after(decision: Decision, source_seed: int) -> int:
        """Return the seed of a member's chance after it took over a source: from (source's seed, member, event)."""
        return RandomStreams(source_seed).integer("successor", decision.member, decision.event)

    def _done(self, decision: Decision, source: Source, seed: int, refused: Iterable[tuple[int, str]]) -> Exploit:
        theirs = self.places[source.member].report
        assert theirs is not None
        return Exploit(
            event=decision.event,
            member=decision.member,
            interval=self.places[decision.member].interval,
            reason=decision.reason,
            source=source.member,
            source_step=source.step,
            source_interval=theirs.interval,
            score_before=decision.score,
            source_score=source.score,
            strategy=text_of(self._config.optimizer_exploit_strategy),
            hyperparameters_before=decision.hyperparameters,
            hyperparameters=source.hyperparameters,
            moves=source.moves,
            seed=seed,
            source_snapshot=theirs.snapshot,
            refused=tuple(refused),
        )


_RECENT_INTERVALS = 2
"""A member that is further behind than this is no source."""


class _Parcels:
    """Parameters of sources, read when they are needed first; those of sources that change themselves, before anything does."""

    def __init__(self, engine: Engine, config: PBTConfig, decisions: Sequence[Decision], changing: set[int]) -> None:
        self._engine = engine
        self._strategy: Strategy = config.optimizer_exploit_strategy
        self._uses: dict[int, int] = {}
        for decision in decisions:
            if decision.is_exploit:
                first = decision.sources[0].member
                self._uses[first] = self._uses.get(first, 0) + 1
        self._read: dict[int, Parcel | None] = {member: self._fetch(member) for member in self._uses if member in changing}

    def of(self, member: int) -> Parcel | None:
        if member not in self._read:
            self._read[member] = self._fetch(member)
        return self._read[member]

    def used(self, decision: Decision) -> None:
        """Let go of what no decision after this one begins with."""
        first = decision.sources[0].member
        self._uses[first] -= 1
        for member in [member for member in self._read if self._uses.get(member, 0) == 0]:
            del self._read[member]

    def _fetch(self, member: int) -> Parcel | None:
        return self._engine.read(member, self._strategy)


def _event_of(exploit: Exploit) -> MemberExploited:
    return MemberExploited(
        step=exploit.source_step,
        event_number=exploit.event,
        member=exploit.member,
        interval=exploit.interval,
        reason=exploit.reason,
        source=exploit.source,
        source_interval=exploit.source_interval,
        score_before=exploit.score_before,
        source_score=exploit.source_score,
        strategy=exploit.strategy,
        hyperparameters_before=exploit.hyperparameters_before,
        hyperparameters=exploit.hyperparameters,
    )
