"""Published data: where it is looked for, what is said without it, and what damaged files are answered with."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphogen.errors import DataError
from morphogen.tasks import Source, Split, fashion_mnist, idx, mnist, sources, text
from morphogen.tasks.tokens import windows

SOURCE = Source(name="things", layouts=(("a.bin", "b-*.bin"), ("all.zip",)), how_to_get="Ask your neighbour.")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """$MORPHOGEN_DATA and the platform's directory."""
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path / "given"))
    monkeypatch.setattr(sources, "PLATFORM_DIRECTORY", tmp_path / "platform")
    return tmp_path / "given", tmp_path / "platform"


def fill(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).touch()
    return directory


# --------------------------------------------------------------------------------------------------------- where it lies


def test_the_users_directory_comes_before_the_platforms(places: tuple[Path, Path]) -> None:
    given, platform = places
    assert SOURCE.locate() is None
    fill(platform / "things", "a.bin", "b-1.bin")
    assert SOURCE.locate() == SOURCE.require() == platform / "things"
    fill(given / "things", "all.zip")
    assert SOURCE.locate() == given / "things"


def test_half_of_the_files_is_not_the_data(places: tuple[Path, Path]) -> None:
    given, platform = places
    fill(given / "things", "a.bin")
    fill(platform / "things", "a.bin", "b-1.bin")
    assert SOURCE.locate() == platform / "things"


def test_without_a_home_the_platforms_directory_is_left(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(sources, "cache_directory", missing)
    assert SOURCE.directories() == (places[1] / "things",)


def test_a_path_of_ones_own_is_the_only_one_looked_at(places: tuple[Path, Path], tmp_path: Path) -> None:
    fill(places[0] / "things", "all.zip")
    own = fill(tmp_path / "own", "a.bin")
    with pytest.raises(DataError, match=f"no complete data in {own}, which must hold a.bin, b-\\*.bin; or all.zip"):
        SOURCE.require(own)
    assert SOURCE.require(fill(own, "b-2.bin")) == own


def test_what_is_missing_is_said_with_how_to_get_it(places: tuple[Path, Path]) -> None:
    given, platform = places
    with pytest.raises(DataError) as caught:
        SOURCE.require()
    for words in ("things", str(given / "things"), str(platform / "things"), "Ask your neighbour."):
        assert words in str(caught.value)


@pytest.mark.parametrize("load", [fashion_mnist.load, mnist.load, text.load])
def test_no_task_makes_up_data(load: Callable[[], Any], places: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="no complete data"):
        load()


# ------------------------------------------------------------------------------------------------------------ idx files


@pytest.fixture
def images(tmp_path: Path, made: Any) -> Path:
    """A small data set in the format of MNIST: the brightness of an image is its class."""
    for name, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 5
        pixels = np.broadcast_to((labels * 50)[:, None, None], (count, 6, 7)).copy()
        pixels[:, 0, 0] = np.arange(count)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(made.idx_bytes(pixels))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(made.idx_bytes(labels))
    return tmp_path


def test_images_are_split_and_standardised(images: Path) -> None:
    found = idx.load_images(images, 10, 0, {})
    assert [len(split) for split in found.splits().values()] == [50, 10, 20]
    assert found.num_classes == 5
    assert found.train.inputs.shape == (50, 1, 6, 7)
    assert found.train.inputs.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found.train.inputs.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert found.decision.targets.bincount().tolist() == [2] * 5
    pixels = idx.read_idx(images / "t10k-images-idx3-ubyte.gz", {})
    seen = torch.cat([found.train.inputs, found.decision.inputs, found.test.inputs]).unique()
    assert len(seen) == len(np.unique(np.concatenate([pixels, idx.read_idx(images / idx.FILES[0], {})])))
    for split in found.splits().values():  # brightness is the class
        assert torch.equal(split.inputs[:, 0, 3, 3].argsort(stable=True), split.targets.argsort(stable=True))


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated archive": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
    "no archive": (lambda path: path.write_bytes(b"<html>not found</html>"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "must be an idx file"),
    "short content": (lambda path: overwrite(path, lambda content: content[:-1]), "must be an idx file"),
    "long content": (lambda path: overwrite(path, lambda content: content + b"\0"), "must be an idx file"),
    "another kind of number": (lambda path: overwrite(path, lambda content: b"\0\0\x0d" + content[3:]), "must be an idx file"),
    "no dimension": (lambda path: overwrite(path, lambda content: b"\0\0\x08\0"), "must be an idx file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", idx.FILES)
def test_a_damaged_file_is_named(damage: str, name: str, images: Path) -> None:
    spoil, words = DAMAGE[damage]
    spoil(images / name)
    with pytest.raises(DataError, match=f"{name}: {words}"):
        idx.load_images(images, 10, 0, {})


def test_labels_must_fit_their_images(images: Path) -> None:
    (images / idx.FILES[3]).write_bytes((images / idx.FILES[1]).read_bytes())
    with pytest.raises(DataError, match=f"{idx.FILES[3]}: must hold one label for each image"):
        idx.load_images(images, 10, 0, {})


@pytest.mark.parametrize("task", [fashion_mnist, mnist])
def test_another_data_set_in_the_same_format_is_refused(task: Any, images: Path) -> None:
    with pytest.raises(DataError, match="must have the SHA-256 .* damaged or another data set"):
        task.load(images)


@pytest.mark.parametrize(("task", "name", "mean", "std"), [
    (fashion_mnist, "fashion-mnist", 0.2860, 0.3530),
    (mnist, "mnist", 0.1307, 0.3081),
])  # fmt: skip
def test_the_published_images(task: Any, name: str, mean: float, std: float, published: Callable[[str], Path]) -> None:
    """Mean and deviation over all training images are those that everybody uses."""
    directory = published(name)
    pixels = idx.read_idx(directory / idx.FILES[0], {}) / np.float32(255)
    assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((mean, std), abs=1e-4)
    found = task.load(directory)
    assert [len(split) for split in found.splits().values()] == [55_000, 5_000, 10_000]
    assert found.num_classes == 10
    counts = [split.targets.bincount(minlength=10) for split in (found.train, found.decision)]
    whole = (counts[0] + counts[1]).double()
    assert (counts[1] - whole / 12).abs().max() <= 1
    assert found.train.inputs.mean().item() == pytest.approx(0.0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- text

TEXT = "Fellow-citizens — of the Senate.\n" * 60


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    (tmp_path / "sotu.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return tmp_path


def decoded(split: Split, alphabet: str) -> str:
    return "".join(alphabet[token] for token in split.inputs.flatten().tolist())


def test_a_text_is_cut_in_its_order(speech: Path) -> None:
    found = text.load(speech)
    alphabet = "".join(sorted(set(TEXT)))
    assert found.num_classes == len(alphabet)
    assert "".join(decoded(split, alphabet) for split in found.splits().values()) == TEXT[: (len(TEXT) - 1) // 64 * 64]
    assert len(found.decision) == len(found.test) == (len(TEXT) - 1) // 64 // 10
    for split in found.splits().values():
        assert split.inputs.shape[1:] == (64,) and split.inputs.dtype == torch.int64
        assert torch.equal(split.inputs.flatten()[1:], split.targets.flatten()[:-1])
    last = found.test.targets[-1, -1]
    assert alphabet[int(last)] == TEXT[(len(TEXT) - 1) // 64 * 64]


def test_bytes_are_another_way_to_read_it(speech: Path) -> None:
    found = text.load(speech, "byte")
    assert found.num_classes == 256
    assert bytes(found.train.inputs.flatten().tolist()) == TEXT.encode()[: found.train.inputs.numel()]


def test_a_text_that_is_too_short_or_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sotu.txt.gz"
    file.write_bytes(gzip.compress(b"short"))
    with pytest.raises(DataError, match="sotu.txt.gz: must hold at least 641 symbols, has 5"):
        text.load(tmp_path)
    file.write_bytes(gzip.compress(b"\xff" * 2000))
    with pytest.raises(DataError, match="sotu.txt.gz: must be UTF-8 text"):
        text.load(tmp_path)
    assert len(text.load(tmp_path, "byte").train) > 0
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="sotu.txt.gz: cannot be read"):
        text.load(tmp_path)


def test_the_published_speeches(published: Callable[[str], Path]) -> None:
    found = text.load(published("sotu"))
    assert found.num_classes == 98
    assert [len(split) for split in found.splits().values()] == [165_625, 500, 2_000]
    assert found.train.inputs.untyped_storage().data_ptr() == found.test.targets.untyped_storage().data_ptr(), "rows are copies"


def test_windows_share_the_memory_of_their_tokens() -> None:
    tokens = torch.arange(20, dtype=torch.int16)
    split = windows(tokens, 4)
    assert split.inputs.tolist() == [[4 * row + place for place in range(4)] for row in range(4)]
    assert split.targets.tolist() == [[4 * row + place + 1 for place in range(4)] for row in range(4)]
    assert split.inputs.data_ptr() == tokens.data_ptr()
    inputs, targets = split.rows(torch.tensor([2]))
    assert (inputs.tolist(), targets.tolist()) == ([[8, 9, 10, 11]], [[9, 10, 11, 12]])
    assert inputs.dtype == targets.dtype == torch.int64
    for bad in (tokens[:4], tokens[:0]):
        with pytest.raises(ValueError, match="`tokens` must hold more than `context_length`"):
            windows(bad, 4)
