"""Training the best lineage of a run again, alone, and comparing what comes of it with what came then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.pbt.history import MemberReport
from morphogen.pbt.replay import ReplayedInterval, ReplayResult, replay
from morphogen.pbt.snapshots import to_bytes
from morphogen.pbt.store import Store
from morphogen.recipes.pbt import check
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_members import AgentFactory
from morphogen.recipes.pbt_results import best_agent
from morphogen.recipes.run_directory import RunDirectory
from morphogen.state import Snapshot


@dataclasses.dataclass(frozen=True)
class ReplayedRun:
    """What came of it.

    Attributes:
        intervals: Of the lineage, each with both scores.
        same_parameters: Whether all that travels of the member, moments included, is what it was at the end of the run, to the
            bit; None if the run's own is gone.
    """

    intervals: tuple[ReplayedInterval, ...]
    same_parameters: bool | None

    @property
    def is_same(self) -> bool:
        """Whether nothing that could be compared differs."""
        return all(interval.is_same for interval in self.intervals) and self.same_parameters is not False

    @property
    def verdict(self) -> str:
        """Return what was found in a sentence."""
        same = sum(interval.is_same for interval in self.intervals)
        scores = f"{same} of {len(self.intervals)} scores are bit-identical to those of the run"
        words = {True: "so are the parameters at the end", False: "the parameters at the end differ"}
        gone = "the run's own parameters are gone, so that they could not be compared"
        return f"{scores}; {gone if self.same_parameters is None else words[self.same_parameters]}."


def replay_run(path: Path) -> ReplayedRun:
    """Train the best lineage of the finished run at ``path`` again; nothing there is changed.

    Raises:
        ValueError: The run was asynchronous.
        MorphogenError: There is no finished run, it is under way, its files are damaged, or the member raised.
    """
    directory, config = RunDirectory.open(path, PBTJobConfig)
    if not directory.read_summary().get("finished"):
        raise MorphogenError(f"{path}: must be a finished run to be replayed. Go on with it first: morphogen resume {path}")
    check(config)
    with Store(path) as store:
        reports, exploits = store.reports(), store.exploits()
    factory = AgentFactory(config.model_dump(mode="json"))
    result = replay(factory, config.pbt, reports, exploits)
    return ReplayedRun(result.intervals, _has_same_parameters(config, path, result, reports))


def _has_same_parameters(config: PBTJobConfig, path: Path, result: ReplayResult, reports: list[MemberReport]) -> bool | None:
    last = result.intervals[-1]
    report = next(each for each in reports if (each.member, each.interval) == (last.member, last.interval))
    try:
        with best_agent(config, path, report) as agent:
            return _without_generators(agent.portable_snapshot()) == _without_generators(result.parameters["snapshot"])
    except CheckpointError:
        return None


def _without_generators(snapshot: Snapshot) -> bytes:
    """Return all of ``snapshot`` as bytes, but for the global generators of the process that made it."""
    tensors = {
        f"{part}/{name}": tensor for part, name, tensor in snapshot.named_tensors() if not name.startswith("generators.")
    }
    return to_bytes({"tensors": tensors, "meta": {name: each for name, each in snapshot.meta.items() if name != "generators"}})
