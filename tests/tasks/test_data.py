"""Splits and their cache: what they hold for ever, and what happens when the cache is damaged or not there."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.datasets import load_digits

from morphogen.tasks import data, digits, mnist1d
from morphogen.tasks.data import Split, TaskData, cached_task_data, stratified_split

SIZES = {"digits": (1000, 300, 497), "mnist1d": (3200, 800, 1000)}
SHAPES = {"digits": (1, 8, 8), "mnist1d": (1, 40)}


@dataclass
class Source:
    """Makes small data and counts how often."""

    calls: int = 0

    def __call__(self) -> TaskData:
        self.calls += 1
        splits = [Split(torch.arange(2.0 * n).reshape(n, 2), torch.arange(n) % 3) for n in (6, 3, 4)]
        return TaskData(*splits, num_classes=3)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, not yet there."""
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture(params=("digits", "mnist1d"))
def loaded(request: pytest.FixtureRequest, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, TaskData]:
    monkeypatch.setenv("MORPHOGEN_DATA", str(shared_cache))
    return request.param, {"digits": digits, "mnist1d": mnist1d}[request.param].load()


def same(first: TaskData, second: TaskData) -> bool:
    pairs = zip(first.splits().values(), second.splits().values(), strict=True)
    equal = all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)
    return equal and first.num_classes == second.num_classes


# ------------------------------------------------------------------------------------------------------ the two data sets


def test_shapes_and_kinds(loaded: tuple[str, TaskData]) -> None:
    name, found = loaded
    assert tuple(len(split) for split in found.splits().values()) == SIZES[name]
    assert found.num_classes == 10
    for split in found.splits().values():
        assert split.inputs.shape[1:] == SHAPES[name]
        assert (split.inputs.dtype, split.targets.dtype) == (torch.float32, torch.int64)
        assert split.inputs.is_contiguous()


def test_no_example_is_in_two_splits(loaded: tuple[str, TaskData]) -> None:
    _, found = loaded
    rows = [{row.numpy().tobytes() for row in split.inputs} for split in found.splits().values()]
    assert [len(one) for one in rows] == [len(split) for split in found.splits().values()]
    assert len(set.union(*rows)) == sum(len(one) for one in rows)


def test_every_class_has_its_share(loaded: tuple[str, TaskData]) -> None:
    name, found = loaded
    cut = list(found.splits().values())[: 3 if name == "digits" else 2]  # the test split of MNIST-1D is as published
    counts = torch.stack([split.targets.bincount(minlength=10) for split in cut]).double()
    shares = counts.sum(0) * counts.sum(1, keepdim=True) / counts.sum()
    assert (counts - shares).abs().max() <= 1.5


def test_loading_twice_gives_the_same(loaded: tuple[str, TaskData]) -> None:
    name, found = loaded
    assert same(found, {"digits": digits, "mnist1d": mnist1d}[name].load())


def test_loading_leaves_every_random_generator_alone(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    digits.load()
    mnist1d.load()
    assert (cache / "mnist1d-v1.safetensors").exists(), "nothing was generated, so nothing was tested"
    now = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert states[0] == now[0]
    assert all(np.array_equal(a, b) for a, b in zip(states[1], now[1], strict=True))
    assert torch.equal(states[2], now[2])
    assert capfd.readouterr() == ("", "")


def test_importing_mnist1d_imports_no_plotting() -> None:
    code = "import sys, morphogen.tasks.mnist1d; print({'matplotlib', 'requests', 'sklearn', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment())
    assert done.stdout.strip() == "set()"


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}


def test_digits_are_split_the_same_for_ever() -> None:
    _, targets = load_digits(return_X_y=True)
    parts = digits.split_indices(targets)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))
    hashes = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for part in parts]
    assert hashes == ["89270f9ebfaaed49", "ce664e7ea5de4653", "c354084cb93c1477"]


def test_digits_are_standardised_by_what_the_training_may_see() -> None:
    pixels, targets = load_digits(return_X_y=True)
    found = digits.load()
    rows = digits.split_indices(targets)
    seen = pixels[rows[0]].ravel()
    assert found.train.inputs.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found.train.inputs.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    expected = (pixels[rows[2]] - seen.mean()) / seen.std()
    assert np.allclose(found.test.inputs.flatten(1).numpy(), expected, atol=1e-6)
    assert found.test.targets.tolist() == targets[rows[2]].tolist()


def test_mnist1d_is_the_published_set(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHOGEN_DATA", str(shared_cache))
    found = mnist1d.load()
    first = [-0.33200568, -0.47191036, -0.77869707, -1.00974083, -0.88235259]
    assert found.train.inputs[0, 0, :5].tolist() == pytest.approx(first, abs=1e-6)
    assert found.train.targets[:8].tolist() == [2, 6, 4, 5, 6, 3, 1, 6]
    assert found.decision.inputs[0, 0, :3].tolist() == pytest.approx([-1.70285392, -1.57111013, -1.63905811], abs=1e-6)
    assert found.decision.targets[:8].tolist() == [6, 6, 0, 9, 3, 8, 9, 9]
    assert found.test.inputs[0, 0, :3].tolist() == pytest.approx([-0.07877078, -0.2107317, -0.09175138], abs=1e-6)
    assert found.test.inputs[-1, 0, -3:].tolist() == pytest.approx([0.65987563, 0.87773436, 1.19315183], abs=1e-6)
    assert found.test.targets[:8].tolist() == [2, 6, 3, 9, 4, 3, 1, 9]


# ---------------------------------------------------------------------------------------------------- splits as records


@pytest.mark.parametrize(
    ("inputs", "targets", "kind", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, r"got shape \(2,\) for inputs of shape \(3, 2\)"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), ValueError, "one class per row"),
        (torch.tensor(1.0), torch.tensor(1), ValueError, "one class per row"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ValueError, "at least one example"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), TypeError, "must be int64, got torch.int32"),
        (torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), TypeError, "floating point or tokens"),
        (torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), TypeError, "must be uint8, got torch.int64"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), ValueError, "a token for each token"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), ValueError, "a token for each token"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "got meta and cpu"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(
    inputs: torch.Tensor, targets: torch.Tensor, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Split(inputs, targets)


def test_splits_that_do_not_fit_each_other_are_refused() -> None:
    good = Split(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"`test` must have features like `train`"):
        TaskData(good, good, Split(torch.zeros(3, 4), good.targets), num_classes=3)
    with pytest.raises(ValueError, match=r"`decision` must have features like `train`"):
        TaskData(good, Split(good.inputs.double(), good.targets), good, num_classes=3)
    with pytest.raises(ValueError, match=r"`train.targets` must lie in \[0, 2\), got 0 to 2"):
        TaskData(good, good, good, num_classes=2)
    with pytest.raises(ValueError, match=r"`decision.targets` must lie in \[0, 3\), got -1 to 2"):
        TaskData(good, Split(good.inputs, torch.tensor([-1, 0, 2])), good, num_classes=3)


def test_rows_are_what_a_network_takes(source: Source) -> None:
    split = source().train
    inputs, targets = split.rows(torch.tensor([4, 1]))
    assert torch.equal(inputs, split.inputs[[4, 1]]) and torch.equal(targets, split.targets[[4, 1]])
    inputs, targets = split.rows(slice(2, 4))
    assert torch.equal(inputs, split.inputs[2:4]) and torch.equal(targets, split.targets[2:4])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        tokens = torch.arange(6, dtype=dtype).reshape(2, 3)
        widened = Split(tokens, tokens).rows(slice(1))
        assert all(part.dtype == torch.int64 and part.tolist() == [[0, 1, 2]] for part in widened)


def test_tokens_out_of_the_vocabulary_are_refused() -> None:
    tokens = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    good = Split(tokens, tokens)
    assert TaskData(good, good, good, num_classes=6).to("cpu").train.inputs.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"`train.targets` must lie in \[0, 5\), got 0 to 5"):
        TaskData(good, good, good, num_classes=5)


def test_data_moves_whole(source: Source) -> None:
    moved = source().train.to("meta")
    assert (moved.inputs.device.type, moved.targets.device.type) == ("meta", "meta")
    here = source()
    there = here.to("cpu")
    assert same(here, there)
    assert there.train.inputs.data_ptr() == here.train.inputs.data_ptr()


@pytest.mark.gpu
def test_data_moves_to_a_gpu_and_back(source: Source) -> None:
    moved = source().to("cuda")
    assert {tensor.device.type for split in moved.splits().values() for tensor in (split.inputs, split.targets)} == {"cuda"}
    assert same(moved.to("cpu"), source())


@given(
    targets=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    cuts=st.lists(st.integers(0, 80), min_size=0, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_stratified_parts_are_whole_disjoint_and_fair(targets: list[int], cuts: list[int], seed: int) -> None:
    labels = np.array(targets, dtype=np.int64)
    edges = [0, *sorted(min(cut, len(labels)) for cut in cuts), len(labels)]
    sizes = [int(size) for size in np.diff(edges)]
    parts = stratified_split(labels, sizes, seed)
    assert [len(part) for part in parts] == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    counts = np.bincount(labels, minlength=5)
    for part, size in zip(parts, sizes, strict=True):
        share = counts * size / len(labels)
        assert np.abs(np.bincount(labels[part], minlength=5) - share).max() < 2
    assert all(np.array_equal(a, b) for a, b in zip(parts, stratified_split(labels, sizes, seed), strict=True))


def test_another_seed_gives_other_parts() -> None:
    targets = np.arange(100) % 10
    assert not np.array_equal(stratified_split(targets, (50, 50), 0)[0], stratified_split(targets, (50, 50), 1)[0])


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (6, -1), ()])
def test_sizes_that_do_not_add_up_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`sizes` must be at least 0 and add up to 5"):
        stratified_split(np.zeros(5, dtype=np.int64), sizes, 0)


# ------------------------------------------------------------------------------------------------------------- the cache


def test_data_is_generated_once_and_read_ever_after(cache: Path, source: Source) -> None:
    generated = cached_task_data("small-v1", source)
    read = cached_task_data("small-v1", source)
    assert source.calls == 1
    assert same(generated, read) and same(read, Source()())
    assert sorted(path.name for path in cache.iterdir()) == ["small-v1.safetensors", "small-v1.safetensors.sha256"]
    digest, name = (cache / "small-v1.safetensors.sha256").read_text().split()
    assert name == "small-v1.safetensors"
    assert digest == hashlib.sha256((cache / name).read_bytes()).hexdigest()


def test_another_name_is_other_data(source: Source) -> None:
    cached_task_data("small-v1", source)
    cached_task_data("small-v2", source)
    assert source.calls == 2


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_cached_files_have_the_usual_permissions(cache: Path, source: Source) -> None:
    cached_task_data("small-v1", source)
    (cache / "ordinary").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()}) == 1


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def store(path: Path, content: bytes) -> None:
    """Content that its checksum vouches for."""
    path.write_bytes(content)
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flipped": (flip_a_bit, "checksum does not match"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "checksum does not match"),
    "empty": (lambda path: path.write_bytes(b""), "checksum does not match"),
    "no checksum": (lambda path: path.with_name(path.name + ".sha256").unlink(), "checksum is missing"),
    "empty checksum": (lambda path: path.with_name(path.name + ".sha256").write_text(""), "checksum does not match"),
    "binary checksum": (lambda path: path.with_name(path.name + ".sha256").write_bytes(b"\xff"), "ascii"),
    "another format": (lambda path: store(path, b"not safetensors"), "header"),
    "tensors missing": (lambda path: store(path, b"\x02\0\0\0\0\0\0\0{}"), "train.inputs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_generated_again_and_said(damage: str, cache: Path, source: Source) -> None:
    spoil, reason = DAMAGE[damage]
    cached_task_data("small-v1", source)
    spoil(cache / "small-v1.safetensors")
    with pytest.warns(UserWarning, match=f"small-v1.safetensors is damaged .*{reason}.*generated again"):
        found = cached_task_data("small-v1", source)
    assert same(found, Source()())
    assert source.calls == 2
    assert same(cached_task_data("small-v1", source), found)
    assert source.calls == 2, "the file was not repaired"


@pytest.mark.parametrize("writes", [0, 1])
def test_killed_between_its_files_the_cache_is_not_taken_for_damaged(
    writes: int, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, done = Path.replace, list[Path]()

    def interrupted(self: Path, target: Path) -> Path:
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_task_data("small-v1", source)
    assert len(list(cache.iterdir())) == writes
    assert same(cached_task_data("small-v1", source), Source()())  # a warning would be an error
    cached_task_data("small-v1", source)
    assert source.calls == 2


@pytest.mark.parametrize("depth", [0, 1])
def test_where_nothing_can_be_written_that_is_said_once(
    depth: int, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")  # refuses root as well, whom permissions do not stop
    blocked = tmp_path.joinpath("file", *["below"] * depth)
    monkeypatch.setenv("MORPHOGEN_DATA", str(blocked))
    with pytest.warns(UserWarning, match=r"cannot be cached in .*file.*Set MORPHOGEN_DATA to a directory you can write to"):
        first = cached_task_data("small-v1", source)
    second = cached_task_data("small-v1", source)  # a second warning would be an error
    assert same(first, second) and same(first, Source()())
    assert source.calls == 2


def test_a_full_disk_leaves_nothing_behind(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, f"No space left on device {cache}")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="No space left"):
        cached_task_data("small-v1", source)
    assert list(cache.iterdir()) == []


def test_a_failing_generator_leaves_nothing_behind(cache: Path) -> None:
    def fail() -> TaskData:
        raise RuntimeError("generator broke")

    with pytest.raises(RuntimeError, match="generator broke"):
        cached_task_data("small-v1", fail)
    assert not cache.exists()


def test_many_at_once_get_whole_data_without_a_warning() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached_task_data("small-v1", Source()), range(64)))
    assert all(same(one, Source()()) for one in found)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", missing)
    monkeypatch.delenv("MORPHOGEN_DATA")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.mark.usefixtures("no_home")
def test_a_user_without_a_home_gets_data_without_cache(source: Source) -> None:
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        assert same(cached_task_data("small-v1", source), Source()())


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("MORPHOGEN_DATA", "~/here")
    assert data.cache_directory() == tmp_path / "here"
    monkeypatch.setenv("MORPHOGEN_DATA", "")
    assert data.cache_directory().name == "morphogen"


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "~/.cache"),
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, "/x/cache"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache"),
        ("linux", {"XDG_CACHE_HOME": ""}, "~/.cache"),
        ("darwin", {"XDG_CACHE_HOME": "/x/cache"}, "~/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/x/Local"}, "/x/Local"),
        ("win32", {}, "~/AppData/Local"),
    ],
)
def test_each_platform_has_its_cache_directory(platform: str, environment: dict[str, str], expected: str) -> None:
    found = data._user_cache_directory(platform, environment)
    assert found == Path(expected.replace("~", str(Path.home())))
