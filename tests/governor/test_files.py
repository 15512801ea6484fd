"""Save and load: a governor that was written down goes on as if nothing had happened, or is not touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphogen.errors import CheckpointError
from morphogen.governor import Governor, GovernorConfig
from morphogen.state import checkpoint

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=20)


def eventful(loop: Any, steps: int) -> None:
    """Train through faults that come at set observations, a rewind among them."""
    for _ in range(steps):
        number = loop.governor._watch.observed + len(loop.governor._pending)
        if number in (100, 103, 170):
            loop.step(loss=lambda loss: loss * float("nan"))
        else:
            if number in (130, 140, 180):
                loop.damage()
            loop.step()


def outcome(loop: Any) -> list[Any]:
    """Everything the verdicts say, NaN made comparable."""
    return [(verdict.step, verdict.action, repr(verdict.findings), repr(verdict.rollback)) for verdict in loop.verdicts]


def reloaded(kit: Any, source: Any, directory: Path, config: GovernorConfig = CONFIG) -> Any:
    """A new process: everything is built anew and loaded."""
    source.state.save(directory / "run")
    source.governor.save(directory / "governor")
    loop = kit.Loop(config, seed=99)
    loop.state.load(directory / "run")
    loop.governor.load(directory / "governor")
    return loop


@pytest.mark.parametrize(("check_every", "at"), [(1, 70), (1, 101), (1, 132), (3, 92), (3, 131)])
def test_a_reloaded_governor_goes_on_identically(kit: Any, tmp_path: Path, check_every: int, at: int) -> None:
    """The same verdicts, the same rewinds to the same generations, the same bits; at any moment, alarms open or not."""
    config = CONFIG.replace(check_every=check_every, max_rewinds=20)
    first = kit.Loop(config)
    eventful(first, at)
    second = reloaded(kit, first, tmp_path, config)
    assert second.governor.status == first.governor.status
    first.verdicts.clear()
    for loop in (first, second):
        eventful(loop, 150 - at)
    assert outcome(second) == outcome(first)
    assert kit.differences(second.contents(), first.contents()) == []
    assert (second.governor.rollbacks, second.governor.skipped_steps) == (
        first.governor.rollbacks,
        first.governor.skipped_steps,
    )
    assert sum(verdict.rollback is not None for verdict in first.verdicts) >= 1


def test_saving_changes_nothing(kit: Any, tmp_path: Path) -> None:
    plain, saving = kit.Loop(CONFIG), kit.Loop(CONFIG)
    for number in range(5):
        eventful(plain, 28)
        eventful(saving, 28)
        saving.governor.save(tmp_path / str(number % 2))
    assert outcome(plain) == outcome(saving)
    assert kit.differences(plain.contents(), saving.contents()) == []


def test_snapshots_are_restored_to_the_bit_after_a_reload(kit: Any, tmp_path: Path) -> None:
    first = kit.Loop(CONFIG)
    eventful(first, 90)
    second = reloaded(kit, first, tmp_path)
    pairs = list(zip(first.governor._keeper.ring.generations, second.governor._keeper.ring.generations, strict=True))
    assert len(pairs) == 3
    for ours, theirs in pairs:
        assert (ours.step, ours.observed, ours.good) == (theirs.step, theirs.observed, theirs.good)
        mine, other = ({(part, name): t for part, name, t in g.snapshot.named_tensors()} for g in (ours, theirs))
        assert kit.differences(mine, other) == []


def test_generations_that_are_gone_are_removed_from_the_directory(kit: Any, tmp_path: Path) -> None:
    loop = kit.Loop(CONFIG)
    for steps in (5, 60, 60):
        loop.steps(steps)
        loop.governor.save(tmp_path)
        kept = {f"generation-{generation.observed}" for generation in loop.governor._keeper.ring.generations}
        assert {path.name for path in tmp_path.iterdir()} == kept | {"governor.json"}


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no digest": without("sha256"),
    "no watch": without("watch"),
    "another format": lambda content: content.update(format="morphogen.governor.v9"),
    "a digit": lambda content: content["watch"].update(rewinds=3),
    "a value of the statistics": lambda content: content["detectors"]["explosion"]["loss"]["values"].__setitem__(0, 5.0),
    "a generation": lambda content: content["generations"].pop(),
}


def damage_file(what: str, directory: Path) -> None:
    path = directory / "governor.json"
    text = path.read_text()
    if what == "cut off":
        path.write_text(text[: len(text) // 2])
    elif what == "empty":
        path.write_text("")
    elif what == "not text":
        path.write_bytes(b"\xff\xfe\x00\x01")
    elif what == "a list":
        path.write_text("[]")
    elif what == "missing":
        path.unlink()
    elif what == "a snapshot is gone":
        shutil.rmtree(next(directory.glob("generation-*")))
    elif what == "a snapshot is damaged":
        table = next(directory.glob("generation-*/model-*.safetensors"))
        table.write_bytes(table.read_bytes()[:-3] + b"abc")
    else:
        content = json.loads(text)
        EDITS[what](content)
        path.write_text(json.dumps(content))


WAYS = (*EDITS, "cut off", "empty", "not text", "a list", "missing", "a snapshot is gone", "a snapshot is damaged")


@pytest.fixture(scope="module")
def saved(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three generations."""
    source = kit.Loop(CONFIG)
    source.steps(80)
    source.governor.save(tmp_path_factory.mktemp("governor"))
    return tmp_path_factory.getbasetemp() / "governor0"


@pytest.mark.parametrize("what", WAYS)
def test_a_damaged_file_is_refused_and_the_governor_is_as_it_was(kit: Any, tmp_path: Path, saved: Path, what: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage_file(what, tmp_path)
    loop, twin = kit.Loop(CONFIG), kit.Loop(CONFIG)
    for run in (loop, twin):
        run.steps(32)
        run.step(loss=kit.nan)
    with pytest.raises(CheckpointError, match=r"governor\.json|generation-") as caught:
        loop.governor.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for run in (loop, twin):
        run.step()
        run.step(loss=kit.nan)
        run.step(loss=kit.nan)
    assert outcome(loop) == outcome(twin) and loop.verdicts[-1].rollback is not None
    assert kit.differences(loop.contents(), twin.contents()) == []


class Counter:
    """A detector of the user's that counts, and alarms at a number."""

    name = "counter"

    def __init__(self, number: int = 10_000) -> None:
        self.number, self.count = number, 0

    def inspect(self, observation: Any) -> None:
        return None

    def accept(self, observation: Any) -> None:
        self.count += 1

    def forget(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_own_detectors_are_saved_and_one_that_is_new_starts_anew(kit: Any, tmp_path: Path) -> None:
    counter = Counter()
    source = kit.Loop(CONFIG, detectors=[counter])
    source.steps(30)
    source.governor.save(tmp_path / "with")
    plain = kit.Loop(CONFIG)
    plain.steps(30)
    plain.governor.save(tmp_path / "without")
    other = Counter()
    loop = kit.Loop(CONFIG, detectors=[other])
    loop.governor.load(tmp_path / "with")
    assert other.count == 30
    other.count = 7
    loop.governor.load(tmp_path / "without")
    loop.damage()
    loop.steps(2, loss=kit.nan)
    assert loop.steps_until("rewind", 2, loss=kit.nan).rollback is not None
    assert other.count == 0, "nothing is known of it at that snapshot"


def test_a_detector_that_refuses_its_state_leaves_the_others_as_they_were(kit: Any, tmp_path: Path) -> None:
    class Renamed(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["renamed" if state["count"] == 30 else "count"]

    source = kit.Loop(CONFIG, detectors=[Counter()])
    source.steps(30)
    source.governor.save(tmp_path)
    loop = kit.Loop(CONFIG, detectors=[Renamed()])
    loop.steps(80)
    before = json.dumps(loop.governor._keeper.memory(0).detectors)
    with pytest.raises(CheckpointError, match="state of a detector does not fit: KeyError: 'renamed'"):
        loop.governor.load(tmp_path)
    assert json.dumps(loop.governor._keeper.memory(0).detectors) == before
    assert loop.governor._watch.observed == 80


def test_a_disk_that_refuses_is_an_error_that_names_the_place(kit: Any, tmp_path: Path) -> None:
    loop = kit.Loop(CONFIG)
    loop.steps(30)
    target = tmp_path / "file"
    target.write_text("not a directory")
    with pytest.raises(CheckpointError, match=f"{target}"):
        loop.governor.save(target / "governor")
    loop.governor.save(tmp_path / "good")
    (tmp_path / "good" / ".governor.json.tmp").mkdir()
    loop.steps(40)
    with pytest.raises(CheckpointError, match="cannot be written"):
        loop.governor.save(tmp_path / "good")
    (tmp_path / "good" / ".governor.json.tmp").rmdir()
    Governor(loop.state, CONFIG).load(tmp_path / "good")


def test_a_save_that_was_cut_short_leaves_the_older_one(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of its writes, the directory loads as the old save or as the new one."""
    loop = kit.Loop(CONFIG)
    loop.steps(70)
    loop.governor.save(tmp_path / "old")
    old = (tmp_path / "old" / "governor.json").read_bytes()
    loop.steps(45)

    class Killed(BaseException):
        pass

    real, seen = checkpoint.write_synced, []
    for allowed in range(30):
        directory = tmp_path / str(allowed)
        shutil.copytree(tmp_path / "old", directory)
        seen.clear()

        def counted(path: Path, content: bytes, allowed: int = allowed) -> None:
            if len(seen) == allowed:
                raise Killed
            seen.append(path)
            real(path, content)

        monkeypatch.setattr(checkpoint, "write_synced", counted)
        try:
            loop.governor.save(directory)
        except Killed:
            assert (directory / "governor.json").read_bytes() == old
        kit.Loop(CONFIG).governor.load(directory)
        if len(seen) < allowed:
            break
    assert 3 < allowed < 29 and (directory / "governor.json").read_bytes() != old


def test_a_reload_between_a_reset_and_the_first_step_after_it_changes_nothing(kit: Any, tmp_path: Path) -> None:
    """The first step of RMSprop after a reset is softened, by whichever governor is there then."""
    config = CONFIG.replace(optimizer="reset")
    first = kit.Loop(config, optimizer="rmsprop")
    first.steps(80)
    first.poison()
    assert first.step().rollback is not None
    first.state.save(tmp_path / "run")
    first.governor.save(tmp_path / "governor")
    second = kit.Loop(config, optimizer="rmsprop", seed=99)
    second.state.load(tmp_path / "run")
    second.governor.load(tmp_path / "governor")
    for loop in (first, second):
        assert loop.step().proceed
    assert kit.differences(second.contents(), first.contents()) == []
