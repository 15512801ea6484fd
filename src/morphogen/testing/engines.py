"""The conformance suite of engines: which engine runs a population changes no number, and no member can fail another.

Call :func:`check_engine` for an engine of your own, or let pytest show each check by itself::

    @pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
    def test_my_engine(check):
        check(EngineCase("mine", MyEngine))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import tempfile
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morphogen.errors import MorphogenError
from morphogen.pbt import PBTConfig, PopulationResult, PopulationTrainer
from morphogen.pbt.engines.base import Engine
from morphogen.pbt.engines.hosting import Birth, Outcome, Succession
from morphogen.pbt.engines.inline import InlineEngine
from morphogen.pbt.member import Factory
from morphogen.pbt.snapshots import read_snapshot
from morphogen.pbt.strategies import Strategy
from morphogen.testing.engine_members import OTHER, SPACES, START, plain_member, troubled_member

LIMIT_SECONDS = 120.0
"""After which an order that did not come back is a failure."""
LATE_SECONDS = 1.0
"""How long a member that hangs is waited for."""
STRATEGIES: tuple[Strategy, ...] = ("reset", "copy", "rescale", "adaptive", ("exp_avg_sq", "step"))


@dataclasses.dataclass(frozen=True)
class EngineCase:
    """An engine to check.

    Attributes:
        name: Of messages, and the id of a test.
        make: Returns a new engine, from a factory of members and the name of the metric.
    """

    name: str
    make: Callable[[Factory, str], Engine]

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def check_engine(make_engine: Callable[[Factory, str], Engine], name: str = "engine") -> None:
    """Run every check on an engine.

    Args:
        make_engine: Returns a new engine, from a factory of members and the name of the metric.
        name: Of messages.

    Raises:
        AssertionError: A check failed; the message says which, and what was expected and found.
    """
    for check in ENGINE_CHECKS:
        check(EngineCase(name, make_engine))


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_training(case: EngineCase) -> None:
    """Each order comes back once, with what the member came to; without orders nothing comes."""
    with _engine(case) as engine:
        assert engine.next(0.01) is None, f"{case}: `next` must return None where nothing was ordered."
        for until in (2, 5):
            for outcome in _train(case, engine, range(3), until).values():
                right = outcome.until == until and outcome.trained is not None and not outcome.problem
                assert right, f"{case}: {until} steps were ordered, {outcome} came back."
                assert outcome.seconds >= 0.0, f"{case}: `seconds` must not be negative, are {outcome.seconds}."
            steps = [engine.values(member)["num_steps"] for member in range(3)]
            assert steps == [until] * 3, f"{case}: everybody must have {until} steps behind them, have {steps}."
        assert engine.next(0.01) is None, f"{case}: each order must come back once."


def check_each_for_itself(case: EngineCase) -> None:
    """What a member comes to hangs on its seed and hyperparameters: not on its place, nor on who else trains, nor when."""
    with _engine(case, births=[Birth(2, START, 12)]) as engine:
        _train(case, engine, [2], 4)
        expected = engine.values(2)
    with _engine(case, births=[Birth(0, OTHER, 10), Birth(1, START, 12), Birth(2, START, 12)]) as engine:
        _train(case, engine, [0], 3)
        _train(case, engine, [0, 1, 2], 4)
        for member in (1, 2):
            _assert_same(f"{case}: member {member} beside others", engine.values(member), expected)


def check_global_generators(case: EngineCase) -> None:
    """The global generators of this process stay where they are."""
    before = _chance()
    with _engine(case) as engine:
        _train(case, engine, range(3), 2)
        _succeed(case, engine, 0, engine.read(1, "copy"))
        engine.values(0)
    assert _chance() == before, f"{case}: a global generator of this process moved."


def check_not_born(case: EngineCase) -> None:
    """A member that cannot be made, or ignores its hyperparameters, is reported with the reason; the others are there."""
    with _engine(case, {1: "not born", 2: "ignores"}, births=[]) as engine:
        problems = engine.begin(_births(range(3)))
        assert problems.keys() == {1, 2}, f"{case}: 1 and 2 must be reported, got {problems}."
        assert "this one is not born" in problems[1], f"{case}: the reason must be what it raised, is {problems[1]}."
        assert "learning_rate" in problems[2], f"{case}: the reason must name what is not in force, is {problems[2]}."
        assert _train(case, engine, [0], 2)[0].trained, f"{case}: member 0 must train though others are not born."
        assert engine.read(1, "copy") is None, f"{case}: a member that is not there has nothing to read."


def check_raising(case: EngineCase) -> None:
    """What a member raises is returned in words; the others train, and it can be made anew and take over one of them."""
    with _engine(case, {1: "raises"}) as engine:
        outcomes = _train(case, engine, range(3), 8)
        failed = [member for member, outcome in outcomes.items() if outcome.trained is None]
        assert failed == [1], f"{case}: member 1 alone must fail, did {failed}."
        assert "this one is broken" in outcomes[1].problem, f"{case}: the problem must be what it raised: {outcomes[1]}."
        _begin(case, engine, _births([1]))
        _succeed(case, engine, 1, engine.read(0, "copy"))
        _assert_weights(f"{case}: member 1 after it took over 0", engine.values(1), engine.values(0))
        assert _train(case, engine, [1], 10)[1].trained, f"{case}: member 1 must train on after it took over another."


def check_keeping(case: EngineCase) -> None:
    """A member whose parameters cannot be read is no source, and no fault of the engine."""
    with _engine(case, {1: "keeps"}) as engine:
        _train(case, engine, range(3), 2)
        assert engine.read(1, "copy") is None, f"{case}: `read` must return None where a member gives nothing."
        assert _train(case, engine, [1], 3)[1].trained, f"{case}: it must train on."


def check_take_over(case: EngineCase) -> None:
    """A member goes on with weights and moments of the source, as inline; the two share nothing."""
    with _engine(case) as engine, _engine(_INLINE) as inline:
        steps = 4
        _train_both(case, engine, inline, [0, 1], steps)
        for number, strategy in enumerate(STRATEGIES):
            before = engine.values(0)
            for each in (engine, inline):
                _succeed(case, each, 1, each.read(0, strategy), strategy=strategy, seed=100 + number)
            found = engine.values(1)
            _assert_weights(f"{case}: member 1 after {strategy}", found, before, moments=strategy == "copy")
            _assert_same(f"{case}: member 1 after {strategy}", found, inline.values(1))
            knobs = _saved(engine, 1)["member"]["knobs"]
            assert knobs == OTHER, f"{case}: hyperparameters after {strategy} must be {OTHER}, are {knobs}."
            _train_both(case, engine, inline, [1], steps + 2)
            _assert_same(f"{case}: member 0 after member 1 trained on", engine.values(0), before)
            after = engine.values(1)
            _assert_same(f"{case}: member 1, trained on after {strategy}", after, inline.values(1))
            steps += 1
            _train_both(case, engine, inline, [0], steps)
            _assert_same(f"{case}: member 1 after member 0 trained on", engine.values(1), after)


def check_parcels_last(case: EngineCase) -> None:
    """What was read stays what it was while its member takes over another one, and serves several members."""
    with _engine(case) as engine:
        _train(case, engine, range(3), 3)
        before, parcel = engine.values(0), engine.read(0, "copy")
        _succeed(case, engine, 0, engine.read(1, "copy"), seed=1)
        for member in (1, 2):
            _succeed(case, engine, member, parcel, seed=1 + member)
            _assert_weights(f"{case}: member {member}", engine.values(member), before, moments=True)


def check_publishing(case: EngineCase) -> None:
    """While a member trains, what is read of it is as of its last report."""
    with _engine(case) as engine:
        for member in (0, 1):
            engine.submit(member, 3, publish="copy")
        _collect(case, engine, 2)
        before = engine.values(0)
        engine.submit(0, 6, publish="copy")
        _succeed(case, engine, 1, engine.read(0, "copy"))
        _assert_weights(f"{case}: member 1, while 0 trains on", engine.values(1), before, moments=True)
        _collect(case, engine, 1)
        steps = engine.values(0)["num_steps"]
        assert steps == 6, f"{case}: member 0 must have 6 steps behind it, has {steps}."


def check_exploring(case: EngineCase) -> None:
    """Other hyperparameters are in force afterwards, and nothing else changes; unknown ones are answered with a problem."""
    with _engine(case) as engine:
        _train(case, engine, range(3), 2)
        before = engine.values(1)
        problem = engine.explore(1, OTHER)
        assert not problem, f"{case}: member 1 must take other hyperparameters, said {problem}."
        saved = _saved(engine, 1)["member"]
        assert saved["knobs"] == OTHER, f"{case}: hyperparameters must be {OTHER}, are {saved['knobs']}."
        _assert_weights(f"{case}: member 1 after it explored", saved, before, moments=True)
        assert "nonsense" in engine.explore(1, {"nonsense": 1.0}), f"{case}: the problem must name what is unknown."


def check_saving(case: EngineCase) -> None:
    """A member made from what was saved of another one trains on bit-identically; a disk that refuses raises."""
    with _engine(case) as engine:
        _train(case, engine, range(3), 3)
        state = _saved(engine, 1)
        _begin(case, engine, [Birth(2, START, 99, state)])
        _train(case, engine, [1, 2], 6)
        _assert_same(f"{case}: a member made from what was saved", engine.values(2), engine.values(1))
        try:
            engine.save(1, os.path.join(tempfile.gettempdir(), "morphogen", "no such folder"))
        except MorphogenError:
            return
        raise AssertionError(f"{case}: `save` must raise a MorphogenError where nothing can be written.")


def check_strategies(case: EngineCase) -> None:
    """Members without ``adopt`` can reset and copy, and other strategies are refused before anybody trains."""
    with _engine(case, factory=plain_member) as engine:
        engine.check("reset")
        engine.check("copy")
        try:
            engine.check("rescale")
        except ValueError:
            return
        raise AssertionError(f"{case}: `check` must raise a ValueError for what members cannot do.")


def check_ending(case: EngineCase) -> None:
    """A member that was ended, and whoever ended with it, can be made anew; to close twice is to close once."""
    with _engine(case) as engine:
        _train(case, engine, range(3), 2)
        ended = {1} | engine.end([1])
        _begin(case, engine, _births(ended))
        _train(case, engine, ended, 2)
        for member in range(3):
            steps = engine.values(member)["num_steps"]
            assert steps == 2, f"{case}: member {member} must have 2 steps behind it, has {steps}."
        engine.close()


def check_hanging(case: EngineCase) -> None:
    """Where members can be ended, one that does not come back can, and the others go on."""
    with _engine(case, {1: "hangs"}) as engine:
        if not engine.interruptible:
            return
        _train(case, engine, range(3), 2)
        late = {0, 1, 2}
        for member in late:
            engine.submit(member, 8)
        while (outcome := engine.next(LATE_SECONDS)) is not None:
            late.remove(outcome.member)
        assert 1 in late, f"{case}: member 1 hangs, yet came back."
        late |= engine.end(late)
        assert not engine.lost() - late, f"{case}: `end` must return all that ended with {late}, not so {engine.lost()}."
        _begin(case, engine, _births(late))
        assert all(outcome.trained for outcome in _train(case, engine, late, 2).values()), f"{case}: all must train anew."


def check_dying(case: EngineCase) -> None:
    """Where members have processes of their own, one whose process is killed comes back with a problem."""
    with _engine(case, {1: "dies"}) as engine:
        if not engine.interruptible:
            return
        outcomes = _train(case, engine, range(3), 8)
        lost = engine.lost()
        assert 1 in lost and outcomes[1].problem, f"{case}: member 1 must come back with a problem, did {outcomes[1]}."
        there = {member for member, outcome in outcomes.items() if outcome.trained} - lost
        assert there | lost == {0, 1, 2}, f"{case}: everybody must be there or lost, there are {there}, lost are {lost}."
        _begin(case, engine, _births(lost))
        assert not engine.lost(), f"{case}: who began again is not lost, {engine.lost()} are."
        assert all(outcome.trained for outcome in _train(case, engine, lost, 2).values()), f"{case}: all must train anew."


def check_population(case: EngineCase) -> None:
    """A synchronous run gives the reports, exploits and parameters of one inline, bit for bit, whatever befalls a member."""
    for troubles, strategy in (({}, "copy"), ({2: "raises", 3: "is NaN"}, "reset")):
        found, expected = (_run(each, troubles, strategy) for each in (case, _INLINE))
        assert expected.exploits, "the population must exploit, to show anything"
        for what in ("best", "hyperparameters", "exploits", "reports"):
            ours, theirs = (_comparable(getattr(result, what)) for result in (found, expected))
            assert ours == theirs, f"{case}: {what} must be those of the inline engine, {theirs}, are {ours}."
        _assert_same(f"{case}: the best member", found.parameters, expected.parameters)


ENGINE_CHECKS: tuple[Callable[[EngineCase], None], ...] = (
    check_training,
    check_each_for_itself,
    check_global_generators,
    check_not_born,
    check_raising,
    check_keeping,
    check_take_over,
    check_parcels_last,
    check_publishing,
    check_exploring,
    check_saving,
    check_strategies,
    check_ending,
    check_hanging,
    check_dying,
    check_population,
)
"""Every check of the suite; each takes an :class:`EngineCase` and raises AssertionError."""


# -- what checks are made of ----------------------------------------------------------------------------------------------

_INLINE = EngineCase("inline, to compare with", InlineEngine)


@contextlib.contextmanager
def _engine(
    case: EngineCase,
    troubles: Mapping[int, str] | None = None,
    *,
    births: Sequence[Birth] | None = None,
    factory: Factory | None = None,
) -> Generator[Engine]:
    """An engine with three members, unless told otherwise."""
    engine = case.make(factory or functools.partial(troubled_member, troubles=dict(troubles or {})), "score")
    try:
        _begin(case, engine, _births(range(3)) if births is None else births)
        yield engine
    finally:
        engine.close()


def _births(members: Collection[int]) -> list[Birth]:
    return [Birth(member, START, 10 + member) for member in sorted(members)]


def _begin(case: EngineCase, engine: Engine, births: Sequence[Birth]) -> None:
    problems = engine.begin(births)
    assert not problems, f"{case}: members must begin, got {problems}."


def _train(case: EngineCase, engine: Engine, members: Collection[int], until: int) -> dict[int, Outcome]:
    for member in members:
        engine.submit(member, until)
    return _collect(case, engine, len(members))


def _collect(case: EngineCase, engine: Engine, count: int) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    for _ in range(count):
        outcome = engine.next(LIMIT_SECONDS)
        assert outcome is not None, f"{case}: {count} orders must come back, {len(outcomes)} did in {LIMIT_SECONDS:g} s."
        assert outcome.member not in outcomes, f"{case}: member {outcome.member} came back twice."
        outcomes[outcome.member] = outcome
    return outcomes


def _train_both(case: EngineCase, engine: Engine, inline: Engine, members: Collection[int], until: int) -> None:
    for each, name in ((engine, case), (inline, _INLINE)):
        failed = [outcome for outcome in _train(name, each, members, until).values() if outcome.trained is None]
        assert not failed, f"{name}: everybody must train, got {failed}."


def _succeed(case: EngineCase, engine: Engine, member: int, parcel: Any, *, strategy: Strategy = "copy", seed: int = 7) -> None:
    assert parcel is not None, f"{case}: `read` must return the parameters of a member that is there."
    problem = engine.take_over(Succession(member, OTHER, seed, strategy), parcel)
    assert not problem, f"{case}: member {member} must take over another one, said {problem}."


def _saved(engine: Engine, member: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        saved = engine.save(member, folder)
        assert saved is not None, f"member {member} must be saved, but its process died."
        digest, num_bytes = saved
        (name,) = os.listdir(folder)
        size = os.path.getsize(os.path.join(folder, name))
        assert name.startswith(digest) and size == num_bytes, f"{name} must be {digest} of {num_bytes} bytes, has {size}."
        return read_snapshot(folder, digest)


def _run(case: EngineCase, troubles: Mapping[int, str], strategy: Any) -> PopulationResult:
    config = PBTConfig(
        population_size=4,
        total_steps=16,
        perturbation_interval=4,
        hyperparameters=SPACES,
        truncation_ratio=0.25,
        optimizer_exploit_strategy=strategy,
        synchronous=True,
    )
    factory = functools.partial(troubled_member, troubles=dict(troubles))
    return PopulationTrainer(factory, config, case.make(factory, config.metric)).run()


def _comparable(value: Any) -> Any:
    """Return ``value`` as text, in which NaN equals itself, without times and traces, in the order of members."""
    if not isinstance(value, tuple):
        return repr(value)
    rows = [dataclasses.asdict(record) for record in value]
    for row in rows:
        row.pop("cpu_seconds", None)
        row["problem"] = row.get("problem", "").split("\n")[0]
    return sorted((row["interval"], row["member"], repr(row)) for row in rows)


def _assert_weights(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], *, moments: bool = False) -> None:
    tables = ("model", "optimizer") if moments else ("model",)
    for table in tables:
        ours, theirs = found["snapshot"].table(table), expected["snapshot"].table(table)
        wrong = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
        assert not wrong and len(ours) == len(theirs), f"{what}: must have the source's {table}, has not {wrong or [*ours]}."


def _assert_same(what: str, found: Any, expected: Any) -> None:
    """Check that two members are equal to the last bit, chance included."""
    ours, theirs = found["snapshot"], expected["snapshot"]
    tensors = {(table, name): tensor for table, name, tensor in theirs.named_tensors()}
    others = {(table, name): tensor for table, name, tensor in ours.named_tensors()}
    wrong = [key for key in tensors.keys() | others.keys() if not _equal(tensors.get(key), others.get(key))]
    assert not wrong, f"{what}: must be equal, is not in {sorted(wrong)}."
    metas = [json.dumps(snapshot.meta, sort_keys=True) for snapshot in (ours, theirs)]
    assert metas[0] == metas[1], f"{what}: must be equal, is not in {metas[0]} and {metas[1]}."
    assert found["num_steps"] == expected["num_steps"], f"{what}: must have as many steps behind it."


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _chance() -> tuple[object, ...]:
    numpy_state = np.random.get_state(legacy=False)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numpy_state)
