"""Workers give the same numbers as one process, whatever happens to them, and leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.executors import processes
from morphogen.errors import EnvironmentFault, MorphogenError, WorkerDied

_SMALL = {"total_steps": 6, "tick_steps": 2}


def _made(num_envs: int = 3, **settings: Any) -> GrowthVectorEnv:
    return GrowthVectorEnv("digits", num_envs, executor="processes", num_workers=2, **{**_SMALL, **settings})


def _workers(env: GrowthVectorEnv) -> list[int]:
    executor = env._executor  # pyright: ignore[reportPrivateUsage]
    assert isinstance(executor, processes.ProcessesExecutor)
    return executor.process_ids


@pytest.fixture(scope="module")
def workers() -> Iterator[GrowthVectorEnv]:
    """Three environments on two workers, for all tests that leave them in order."""
    env = _made()
    yield env
    env.close()


def test_trajectories_are_those_of_one_process(workers: Any, game_on: Any, begin: Any, assert_same: Any) -> None:
    assert_same(begin(3).play(7), game_on(workers).play(7))


def test_state_goes_from_one_executor_to_the_other(workers: Any, game_on: Any, begin: Any, assert_same: Any) -> None:
    games = [begin(3), game_on(workers)]
    for game, other in (games, reversed(games)):
        game.play(4)
        state = game.state_dict()
        expected = game.play(4)
        other.play(1)
        other.load_state_dict(state)
        assert_same(expected, other.play(4))


def test_a_fault_in_one_worker_is_no_others(workers: Any, game_on: Any, begin: Any, assert_same: Any) -> None:
    inject = {1: ["nan_output@2"]}
    faulty = game_on(workers, inject=inject)
    played = faulty.play(5)
    assert_same(begin(3, inject=inject).play(5), played)
    assert_same(begin(3).play(5), played, [0, 2], [0, 2])
    assert played["terminated"][:3].tolist() == [[False] * 3, [False, True, False], [True, False, True]]


def _kill_once_busy(pid: int) -> threading.Thread:
    """Kill a worker when it has worked for a while on what it is told next."""

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def kill(before: int = cpu_ticks()) -> None:
        while cpu_ticks() < before + 3:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("loaded", [False, True])
def test_a_worker_killed_within_a_step_is_replaced_and_no_bit_differs(
    workers: Any, game_on: Any, begin: Any, assert_same: Any, loaded: bool
) -> None:
    game, same = game_on(workers), begin(3)
    for each in (game, same):
        each.play(4)
    if loaded:  # then the way back leads by the state that was loaded
        game.load_state_dict(same.state_dict())
        assert_same(same.play(1), game.play(1))
    for place in (0, 1):
        pid = _workers(workers)[place]
        os.kill(pid, signal.SIGSTOP)  # so that it cannot be done with the step before it dies
        killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        killer.start()
        assert_same(same.play(1), game.play(1))
        killer.join()
        assert _workers(workers)[place] != pid
    assert_same(same.play(3), game.play(3))


def test_a_worker_that_hangs_past_its_deadline_is_replaced_and_no_bit_differs(
    game_on: Any, begin: Any, assert_same: Any
) -> None:
    env = _made(worker_deadline_seconds=30.0)
    game, same = game_on(env), begin(3)
    assert_same(same.play(1), game.play(1))
    executor = env._executor  # pyright: ignore[reportPrivateUsage]
    executor._config = executor._config.replace(worker_deadline_seconds=3.0)  # a start takes longer on a busy machine
    pid = _workers(env)[0]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(3.5, lambda: setattr(executor, "_config", env.config)).start()
    assert_same(same.play(2), game.play(2))
    assert _workers(env)[0] != pid
    env.close()


@pytest.mark.slow
def test_a_worker_killed_while_it_trains_is_replaced_and_no_bit_differs(game_on: Any, begin: Any, assert_same: Any) -> None:
    long = {"total_steps": 400, "tick_steps": 100}
    env = _made(**long)
    game, same = game_on(env), begin(3, **long)
    assert_same(same.play(1), game.play(1))
    pid = _workers(env)[0]
    killer = _kill_once_busy(pid)
    assert_same(same.play(1), game.play(1))
    killer.join()
    assert _workers(env)[0] != pid
    env.close()


def test_a_worker_that_dies_again_and_again_stops_the_step(
    workers: Any, game_on: Any, assert_same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = game_on(workers)
    game.play(1)
    state, pids = game.state_dict(), _workers(workers)
    expected = game.play(2)
    game.load_state_dict(state)
    monkeypatch.setattr(processes, "_MAX_DEATHS", 0)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="environments 2 died 1 times in a row in 'step', last by signal SIGKILL") as caught:
        game.play(1)
    assert caught.value.env_indices == (2,) and isinstance(caught.value, MorphogenError)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(ValueError, match="did not come to its end"):
        game.play(1)
    game.load_state_dict(state)
    assert_same(expected, game.play(2))


def test_an_error_in_a_worker_names_the_environment(workers: Any, game_on: Any) -> None:
    game = game_on(workers)
    executor = workers._executor
    with pytest.raises(EnvironmentFault, match="environment 2 raised SlotError") as caught:
        executor.step(np.array([[0] * 8, [0] * 8, [5] + [0] * 7]))  # past the check of the mask
    assert caught.value.env_index == 2
    assert "in worker" not in str(caught.value) and "fossil" in str(caught.value.__cause__).lower()
    game_on(workers).play(1)
    assert game.env is workers


def test_a_state_that_does_not_fit_is_refused_as_it_is_inline(workers: Any, game_on: Any, begin: Any) -> None:
    state = begin(3, num_slots=2).env.state_dict()
    state["episodes"][1]["files"].popitem()
    found: list[type[BaseException]] = []
    for env in (begin(3).env, workers):
        with pytest.raises(MorphogenError) as caught:
            env.load_state_dict(state)
        found.append(caught.type)
    assert found[0] is found[1]


def test_closing_leaves_no_process_and_no_shared_memory(game_on: Any) -> None:
    segments, files = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    children = set(multiprocessing.active_children())
    env = _made()
    game_on(env).play(1)
    pids = _workers(env)
    assert len(pids) == 2 and set(os.listdir("/dev/shm")) == segments
    env.close()
    env.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert set(multiprocessing.active_children()) == children
    assert len(os.listdir("/proc/self/fd")) <= files + 6  # of the arenas that multiprocessing keeps for later, and its tracker


def test_a_config_survives_the_way_to_a_worker() -> None:
    config = GrowthEnvConfig(slots=("block1",), total_steps=7, executor="processes", num_workers=2)
    assert GrowthEnvConfig.model_validate_json(config.model_dump_json()) == config


def test_workers_are_as_many_as_cores_and_at_most_one_for_each_environment() -> None:
    cores = processes.available_cores()
    for num_envs in (1, cores, 2 * cores):
        env = GrowthVectorEnv("digits", num_envs, executor="processes")
        rows = env._executor._rows
        assert len(rows) == min(cores, num_envs)
        assert sorted(row for own in rows for row in own) == list(range(num_envs))
        env.close()


_SCRIPT = """
import numpy as np
from morphogen.envs import GrowthVectorEnv

def main():
    env = GrowthVectorEnv("digits", 2, executor="processes", num_workers=1, total_steps=6, tick_steps=2)
    env.reset(seed=0)
    env.step(np.zeros((2, 8), int))
    print("pid", env._executor.process_ids[0], flush=True)
    {end}

{guard}main()
"""


def _script(folder: Path, *, end: str = "pass", guard: str = 'if __name__ == "__main__": ') -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(_SCRIPT.format(end=end, guard=guard))
    command = [sys.executable, "-W", "error", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_workers_end_with_a_script_that_does_not_close_them(tmp_path: Path, end: str) -> None:
    process = _script(tmp_path, end=end)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (-9 if "kill" in end else 0) and not err
    assert _gone(int(out.split()[1]))


@pytest.mark.slow
def test_a_script_without_the_guard_is_told_so(tmp_path: Path) -> None:
    process = _script(tmp_path, guard="")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert 'must stand below `if __name__ == "__main__":`' in err
