"""A save that is cut short, by an error or by a kill, leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from morphogen.errors import CheckpointError
from morphogen.state import TrainingState


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


class Disk:
    """Counts the calls by which a save changes the disk; at call number ``fatal`` it raises, or goes on half-way.

    Wraps ``os.open``, file writes, ``os.fsync``, ``os.replace``, ``os.unlink``, ``os.mkdir`` and ``os.rmdir`` as used by
    the code under test, below :mod:`pathlib` where that goes through them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fatal: int, error: Callable[[], BaseException]) -> None:
        self.calls: list[str] = []
        self.fatal, self.error = fatal, error
        for name in ("fsync", "replace", "unlink", "mkdir", "open"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        real_open = Path.open

        def open_path(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_open(path, mode, *args, **kwargs)
            return _Writer(file, self) if "w" in mode else file

        monkeypatch.setattr(Path, "open", open_path)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            return real(*args, **kwargs)

        return call

    def count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.fatal:
            raise self.error()


class _Writer:
    """A file whose writes are counted; the fatal one writes half of the bytes first."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        try:
            self.disk.count("write")
        except BaseException:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise
        return self.file.write(content)


def made(value: float) -> tuple[nn.Module, TrainingState]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    nn.init.constant_(model.weight, value)
    return model, TrainingState(model, optimizer, extras={"norm": nn.BatchNorm1d(2)})


def loaded(path: Path) -> tuple[float, Any]:
    """The weight and the step in the checkpoint: equal if it is whole."""
    model, state = made(-1.0)
    data = state.load(path)
    assert (model.weight == model.weight[0, 0]).all()
    return float(model.weight[0, 0].detach()), data


def calls_of_a_save(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    _, state = made(0.0)
    state.save(path, user_data=0)
    with monkeypatch.context() as patch:
        disk = Disk(patch, -1, Killed)
        nn.init.constant_(state.models[""].weight, 9.0)
        state.save(path, user_data=9)
    return disk.calls


def test_what_a_save_does_to_the_disk_and_in_which_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data is synced before the manifest names it, the manifest before the old data goes."""
    calls = calls_of_a_save(monkeypatch, tmp_path)
    assert calls.count("write") == 5  # model, extras.norm, optimizer, loose, manifest
    last_write = len(calls) - 1 - calls[::-1].index("write")
    assert calls[:last_write] == ["write", "fsync", "replace"] * 4 + ["open", "fsync"]
    assert calls[last_write:][:5] == ["write", "fsync", "replace", "open", "fsync"]
    assert set(calls[last_write + 5 :]) == {"unlink"}


ERRORS = {
    "killed": Killed,
    "disk full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "read-only": lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "denied": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
}


@pytest.mark.parametrize("error", ERRORS)
def test_cut_short_at_any_call_the_old_checkpoint_or_the_new_one_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str
) -> None:
    calls = calls_of_a_save(monkeypatch, tmp_path / "count")
    commit = len(calls) - 1 - calls[::-1].index("replace")
    for fatal in range(len(calls)):
        path = tmp_path / str(fatal)
        model, state = made(1.0)
        state.save(path, user_data=1)
        nn.init.constant_(model.weight, 2.0)
        expected = CheckpointError if error != "killed" else Killed
        with monkeypatch.context() as patch, pytest.raises(expected):
            Disk(patch, fatal, ERRORS[error])
            state.save(path, user_data=2)
        assert (model.weight == 2.0).all()
        assert loaded(path) == ((2.0, 2) if fatal > commit else (1.0, 1))
        if error != "killed":
            assert not list(path.glob(".*"))  # no half-written file is left where space may be short
        state.save(path, user_data=3)
        assert loaded(path) == (2.0, 3)
        assert len(list(path.iterdir())) == 5


def test_the_first_save_cut_short_leaves_nothing_that_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, state = made(1.0)
    with monkeypatch.context() as patch:
        disk = Disk(patch, -1, Killed)
        state.save(tmp_path / "count" / "deep")
    assert disk.calls[0] == "mkdir"
    commit = len(disk.calls) - 1 - disk.calls[::-1].index("replace")
    for fatal in range(commit + 1):
        path = tmp_path / str(fatal) / "deep"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Disk(patch, fatal, Killed)
            state.save(path)
        with pytest.raises(CheckpointError, match="not found, so there is no checkpoint here"):
            state.load(path)
        state.save(path)
        assert loaded(path) == (1.0, None)


def test_the_message_names_the_place_and_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, state = made(1.0)
    with monkeypatch.context() as patch:
        Disk(patch, 3, ERRORS["disk full"])
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/c: cannot be written: .*No space left on device") as caught:
            state.save(tmp_path / "c")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("mine")
    for path in (tmp_path / "c", tmp_path / "c" / "d"):
        with pytest.raises(CheckpointError, match="c.*: cannot be written: "):
            made(1.0)[1].save(path)
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written: .*Permission denied"):
        made(1.0)[1].save(tmp_path / "c")
    tmp_path.chmod(0o700)


SAVE_FOR_EVER = """
    import sys
    import torch
    from torch import nn
    from morphogen.state import TrainingState

    torch.set_num_threads(1)
    model = nn.Linear(300, 300)
    state = TrainingState(model, torch.optim.Adam(model.parameters()))
    for step in range(100_000):
        nn.init.constant_(model.weight, float(step))
        state.save(sys.argv[1], user_data=step)
        if step == 0:
            print("saving", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_at_a_random_moment_the_checkpoint_is_whole(tmp_path: Path) -> None:
    last = -1
    script = textwrap.dedent(SAVE_FOR_EVER)
    for attempt in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n"
        time.sleep(0.1 + 0.0137 * (time.monotonic_ns() % 10) + 0.1 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        model = nn.Linear(300, 300)
        step = TrainingState(model, torch.optim.Adam(model.parameters())).load(tmp_path)
        assert isinstance(step, int)
        assert (model.weight == float(step)).all()
        last = max(last, step)
    assert last > 0
