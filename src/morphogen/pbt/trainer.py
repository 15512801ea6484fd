"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846) over any kind of member, on any engine.

synchronous:    everybody trains for an interval; decisions about all; again
asynchronous:   whoever comes to the end of an interval is decided about, and goes on
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.pbt import engines
from morphogen.pbt.changes import differences, fixed_differences
from morphogen.pbt.config import PBTConfig
from morphogen.pbt.engines.base import Engine
from morphogen.pbt.engines.hosting import Birth, Outcome
from morphogen.pbt.events import MemberLost, PopulationReconfigured
from morphogen.pbt.history import Exploit, MemberReport
from morphogen.pbt.member import Factory
from morphogen.pbt.population import Place, Population
from morphogen.pbt.selection import ranked
from morphogen.pbt.snapshots import read_snapshot
from morphogen.pbt.store import FORMAT, Store
from morphogen.telemetry.events import Emit, discard

_GLANCE_SECONDS = 1.0
"""How long to wait for members at a time before looking at the clock again."""


class PopulationLost(MorphogenError):
    """Nobody is left who could be taken over."""


@dataclasses.dataclass(frozen=True)
class PopulationResult:
    """What a population came to.

    Attributes:
        best: Place of the best member, by its last score.
        score: Of it.
        hyperparameters: Of it, at the end.
        parameters: All that travels of it, moments included, as its ``get_parameters`` gave it; None if it was interrupted.
        reports: Every interval of every member, by interval and member.
        exploits: Every takeover and exploration, by event.
        finished: False if it was stopped before the end.
    """

    best: int
    score: float
    hyperparameters: Mapping[str, Any]
    parameters: Any
    reports: tuple[MemberReport, ...]
    exploits: tuple[Exploit, ...]
    finished: bool


class PopulationTrainer:
    """Trains a population.

    Args:
        member_factory: Called as ``member_factory(place, hyperparameters, seed)``, it returns a member that has not trained.
            With processes and Ray it must be importable.
        config: The rules.
        engine: "inline", "processes" or "ray", or an engine of one's own.
        directory: Where reports, decisions and snapshots are kept, so that a killed run can go on; None: in memory alone.
        options: Of the engine, for example ``{"num_workers": 2}``; see :mod:`morphogen.pbt.engines`.
        accept_changes: Go on in a directory although its run had other settings of those in
            :data:`~morphogen.pbt.changes.CHANGEABLE`; decisions that were carried out stay as they are.
        clock: Seconds by which ``straggler_deadline`` is measured.
        emit: Receives events.

    Raises:
        ValueError: There is no such engine, or a setting would have no effect on it.
        MorphogenError: The directory is in use or cannot be written, or holds a run with another config.

    Example:
        >>> from morphogen.pbt import FunctionMember
        >>> def climb(hyperparameters, state, report):
        ...     height = state or 0.0
        ...     while True:
        ...         height += hyperparameters["step"]
        ...         report(height, state=height)
        >>> config = PBTConfig(population_size=4, total_steps=20, perturbation_interval=5, truncation_ratio=0.25,
        ...     synchronous=True, hyperparameters={"step": {"kind": "float", "low": 0.0, "high": 1.0}})
        >>> result = PopulationTrainer(lambda member, hyperparameters, seed: FunctionMember(climb), config).run()
        >>> result.finished, len(result.reports), len(result.exploits)
        (True, 16, 3)
    """

    def __init__(
        self,
        member_factory: Factory,
        config: PBTConfig,
        engine: str | Engine = "inline",
        *,
        directory: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        accept_changes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = discard,
    ) -> None:
        """Make engine and directory; members are made by :meth:`run`."""
        self.config = config
        self._engine = engines.make(engine, member_factory, config, options or {})
        self._emit, self._clock = emit, clock
        self._population = Population(config, self._engine, emit)
        self._reports: list[MemberReport] = []
        self._exploits: list[Exploit] = []
        self._latest: dict[int, int] = {}  # member -> place of its exploit whose outcome is not known yet
        self._stop = False
        self._given_up: list[Outcome] = []
        self._changes: tuple[str, ...] = ()
        self._store: Store | None = None
        if directory is not None:
            try:
                self._store = Store(Path(directory))
                self._claim(self._store, accept_changes)
            except BaseException:
                self.close()
                raise

    def run(self) -> PopulationResult:
        """Train to the end, from the beginning or from where an earlier run in the directory came to.

        Raises:
            ValueError: Members cannot do what ``optimizer_exploit_strategy`` asks for.
            PopulationLost: Nobody is left who could be taken over.
            MorphogenError: The disk refused, or the engine cannot go on.
        """
        with contextlib.closing(self):
            self._begin()
            if self.config.synchronous:
                self._run_together()
            else:
                self._run_apart()
            return self._result()

    def stop(self) -> None:
        """Let :meth:`run` end as soon as nobody trains; what was done is kept."""
        self._stop = True

    def close(self) -> None:
        """End members and engine, and let go of the directory."""
        self._engine.close()
        if self._store is not None:
            self._store.close()

    # -- beginning --------------------------------------------------------------------------------------------------

    def _claim(self, store: Store, accept_changes: bool) -> None:
        """See that the directory is new, or of the same run."""
        mine, theirs = self.config.model_dump(mode="json"), store.fact("config")
        if theirs is None:
            store.note(format=FORMAT, config=mine)
            return
        if store.fact("format") != FORMAT:
            raise CheckpointError(f"{store.path}: must be of the format {FORMAT}, got {store.fact('format')}.")
        changed = differences(theirs, mine)
        if not changed:
            return
        done = max((report.interval for report in store.reports()), default=0)
        fixed = fixed_differences(theirs, mine, done)
        if fixed or not accept_changes:
            hint = "Use that config, or a new directory."
            if not fixed:
                hint = f"{hint[:-1]}, or accept the change."
            raise MorphogenError(
                f"{store.path}: holds a run with another config: {'; '.join(fixed if accept_changes else changed)}. {hint}"
            )
        store.note(config=mine)
        self._changes = tuple(changed)

    def _begin(self) -> None:
        population = self._population
        if self._changes:
            config = self.config.model_dump(mode="json")
            self._emit(
                PopulationReconfigured(step=0, changes=self._changes, total_steps=self.config.total_steps, config=config)
            )
        if self._store is not None:
            self._reports, self._exploits = self._store.reports(), self._store.exploits()
        if self._reports:
            self._go_on()
        else:
            population.begin(population.births())
        self._engine.check(self.config.optimizer_exploit_strategy)

    def _go_on(self) -> None:
        """Bring everybody to where they were, and do again what was decided then."""
        latest = {member: 0 for member in range(self.config.population_size)}
        latest |= {report.member: report.interval for report in self._reports}
        together = min(latest.values()) if self.config.synchronous else None
        at = latest if together is None else dict.fromkeys(latest, together)
        behind = [report for report in self._reports if report.interval == at[report.member]]
        self._put(behind, on_damage=self._lose)
        self._population.begin([birth for birth in self._population.births() if at[birth.member] == 0])
        assert self._store is not None
        if together is None:
            events = [exploit.event + 1 for exploit in self._exploits]
            self._population.scheduler.load_state_dict({"num_decisions": max(events, default=0)})
            self._exploits = [exploit for exploit in self._exploits if exploit.interval < latest[exploit.member]]
            for member, interval in latest.items():  # snapshots are of the end of an interval: what was done after it is undone
                self._store.forget_exploits(interval, member)
            return
        self._exploits = [exploit for exploit in self._exploits if exploit.interval < max(1, together)]
        if 0 < together < self.config.num_intervals:
            self._store.forget_exploits(together)
            self._population.scheduler.load_state_dict({"num_decisions": together - 1})
            self._decide()
        ahead = [report for report in self._reports if report.interval > together]
        self._put(ahead, on_damage=self._train_again)

    def _put(self, reports: Sequence[MemberReport], on_damage: Callable[[MemberReport, str], None]) -> None:
        """Make the members of ``reports`` as they were then, where their snapshots are of use."""
        assert self._store is not None
        births: list[Birth] = []
        for report in reports:
            if report.problem:
                self._population.went_on_from(report)
                continue
            try:
                state = read_snapshot(self._store.folder, report.snapshot or "")
            except CheckpointError as error:
                on_damage(report, str(error))
                continue
            self._population.went_on_from(report)
            births.append(Birth(report.member, report.hyperparameters, report.seed, state))
        self._population.begin(births)

    def _lose(self, report: MemberReport, problem: str) -> None:
        """Note that a member is gone; it will take over another one."""
        self._population.went_on_from(dataclasses.replace(report, problem=problem))
        self._emit(MemberLost(step=report.step, member=report.member, interval=report.interval, problem=problem))

    def _train_again(self, report: MemberReport, problem: str) -> None:
        """Forget a report: its member is an interval behind, and can do it again."""
        self._reports = [each for each in self._reports if each is not report]

    # -- training ---------------------------------------------------------------------------------------------------

    def _run_together(self) -> None:
        population, last = self._population, self.config.num_intervals
        while not self._stop and not all(map(population.is_done, population.places)):
            interval = min(place.interval for place in population.places) + 1
            waiting = [place for place in population.places if place.interval < interval]
            for place in waiting:
                self._order(place)
            for _ in waiting:
                self._report(self._next_outcome([place for place in waiting if place.interval < interval]))
            if self._store is not None:
                self._store.forget_before(interval)
            if interval < last:
                self._decide()

    def _run_apart(self) -> None:
        population = self._population
        training = [place for place in population.places if not population.is_done(place)]
        for place in training:
            self._order(place, publish=True)
        while training:
            place = self._report(self._next_outcome(training))
            if self._store is not None:
                self._store.keep_latest(place.member, place.interval)
            if self._stop or population.is_done(place):
                training.remove(place)
                continue
            self._decide(about=place.member)
            self._order(place, publish=True)

    def _order(self, place: Place, *, publish: bool = False) -> None:
        until = self._population.target(place)
        if not place.is_lost:
            self._engine.submit(place.member, until, publish=self.config.optimizer_exploit_strategy if publish else None)
            return
        self._given_up.append(Outcome(place.member, until, None, "nobody could be taken over"))

    def _next_outcome(self, training: Sequence[Place]) -> Outcome:
        """Return what came of one of the orders; those that do not come back in time are given up."""
        if self._given_up:
            return self._given_up.pop()
        deadline = self.config.straggler_deadline
        if deadline is None:
            outcome = self._engine.next()
            assert outcome is not None
            return outcome
        started = self._clock()
        while (remaining := started + deadline - self._clock()) > 0:
            outcome = self._engine.next(min(remaining, _GLANCE_SECONDS))
            if outcome is not None:
                return outcome
        late = [place.member for place in training]
        self._engine.end(late)
        problem = f"was not back after {deadline:g} s"
        targets = [Outcome(member, self._population.target(self._population.places[member]), None, problem) for member in late]
        self._given_up = targets[1:]
        return targets[0]

    def _report(self, outcome: Outcome) -> Place:
        place, snapshot, num_bytes = self._population.places[outcome.member], None, 0
        if self._store is not None and outcome.trained is not None:
            saved = self._engine.save(outcome.member, self._store.folder)
            if saved is None:
                outcome = dataclasses.replace(outcome, trained=None, problem="its process died while it was saved")
            else:
                snapshot, num_bytes = saved
        report = self._population.reported(outcome, snapshot)
        self._reports.append(report)
        if self._store is not None:
            self._store.add_report(report, num_bytes)
        number = self._latest.pop(report.member, None)
        if number is not None:
            self._exploits[number] = dataclasses.replace(self._exploits[number], score_after=report.score)
        return place

    def _decide(self, about: int | None = None) -> None:
        """Decide about everybody, or about one, and carry it out."""
        self._revive()
        population, records = self._population, self._population.records()
        if not any(record.is_sound for record in records) and len(records) == self.config.population_size:
            raise PopulationLost(_all_lost([place.report for place in population.places]))
        ready = len(records) >= math.ceil(self.config.ready_fraction * self.config.population_size)
        if about is not None and not ready:
            return
        done = population.carry_out(population.scheduler.decide(records, about=None if about is None else [about]))
        if self._reports[-1].interval > population.places[0].interval:  # of a run that goes on: some have come further already
            scores = {(report.member, report.interval): report.score for report in self._reports}
            done = [dataclasses.replace(each, score_after=scores.get((each.member, each.interval + 1))) for each in done]
        new = {exploit.member: len(self._exploits) + place for place, exploit in enumerate(done) if exploit.score_after is None}
        self._latest |= new
        self._exploits += done
        if self._store is not None and done:
            self._store.add_exploits(done)

    def _revive(self) -> None:
        """Bring members whose process died between two intervals back to the end of the last one, where that was saved."""
        for member in self._engine.lost():
            place = self._population.places[member]
            place.is_lost = True
            if self._store is None or place.report is None or place.report.snapshot is None:
                continue
            with contextlib.suppress(CheckpointError):
                state = read_snapshot(self._store.folder, place.report.snapshot)
                self._population.begin([Birth(member, place.hyperparameters, place.seed, state)])

    # -- results ----------------------------------------------------------------------------------------------------

    def _result(self) -> PopulationResult:
        order = ranked(self.config, [place.report.record() for place in self._population.places if place.report is not None])
        if not order:
            raise PopulationLost(_all_lost([place.report for place in self._population.places]))
        finished = all(map(self._population.is_done, self._population.places))
        place = self._population.places[order[0].member]
        return PopulationResult(
            best=place.member,
            score=order[0].score,
            hyperparameters=dict(place.hyperparameters),
            parameters=self._engine.values(place.member) if finished else None,
            reports=tuple(sorted(self._reports, key=lambda report: (report.interval, report.member))),
            exploits=tuple(self._exploits),
            finished=finished,
        )


def _all_lost(reports: Sequence[MemberReport | None]) -> str:
    problems = {report.problem.split("\n")[0] or f"score {report.score}" for report in reports if report is not None}
    return f"no member is left with a score that is a number: {'; '.join(sorted(problems)) or 'none could be made'}."
