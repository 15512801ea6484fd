"""Members in worker processes: the conformance suite, and what processes alone can do wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from morphogen.pbt.engines.hosting import Birth
from morphogen.pbt.engines.processes import ProcessesEngine
from morphogen.testing import ENGINE_CHECKS, EngineCase
from morphogen.testing.engine_members import START, troubled_member

CASE = EngineCase("processes", ProcessesEngine)


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_processes_conform(check: Callable[[EngineCase], None]) -> None:
    check(CASE)


def is_there(segment: str) -> bool:
    return (Path("/dev/shm") / segment).exists()


def begun(num_workers: int) -> ProcessesEngine:
    engine = ProcessesEngine(troubled_member, "score", num_workers=num_workers)
    assert engine.begin([Birth(member, START, member) for member in range(3)]) == {}
    return engine


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is not seen as files here")
def test_shared_memory_is_given_back() -> None:
    engine = begun(2)
    parcel = engine.read(0, "copy")
    assert parcel is not None and is_there(parcel.name)
    name = parcel.name
    del parcel
    assert not is_there(name)
    for member in range(3):
        engine.submit(member, 2, publish="copy")
    for _ in range(3):
        assert engine.next(60.0) is not None
    published = {parcel.name for parcel in (engine.read(member, "copy") for member in range(3)) if parcel is not None}
    assert len(published) == 3 and all(map(is_there, published))
    engine.close()
    assert not any(map(is_there, published))


def test_a_worker_that_dies_between_orders_is_noticed_and_replaced() -> None:
    engine = begun(2)
    os.kill(engine.process_ids[0], signal.SIGKILL)
    assert engine.read(0, "copy") is None  # noticed now
    assert engine.lost() == {0, 2}
    assert engine.begin([Birth(0, START, 0)]) == {} and engine.lost() == {2}
    engine.submit(0, 1)
    outcome = engine.next(60.0)
    assert outcome is not None and outcome.trained is not None
    engine.close()


def test_processes_end_with_the_engine() -> None:
    engine = begun(2)
    running = engine.process_ids
    assert len(running) == 2
    engine.close()
    for number in running:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
