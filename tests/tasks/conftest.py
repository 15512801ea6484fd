"""Data for the tests of tasks: the published files where they are here, small files of the same format elsewhere."""

from __future__ import annotations

import dataclasses
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from morphogen import tasks
from morphogen.tasks import Task, TaskData

ROOT = Path(__file__).parents[2]
PLACES = [Path(os.environ["MORPHOGEN_DATA"])] if "MORPHOGEN_DATA" in os.environ else []
PUBLISHED = {"mnist": "mnist", "fashion_mnist": "fashion-mnist", "text": "sotu", "text_byte": "sotu"}

WORDS = "the a little big dog cat girl boy sat ran saw was happy sad tree ball and then they it went home".split()


def published_directory(name: str) -> Path:
    """Return the directory of a published data set, or skip the test."""
    for place in (*PLACES, ROOT.parent / "shared" / "data"):
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"{name} is neither in $MORPHOGEN_DATA nor in ../shared/data")


@pytest.fixture(scope="session")
def published() -> Callable[[str], Path]:
    return published_directory


def cifar_records(count: int, seed: int, classes: int = 4) -> bytes:
    """Return records as in data_batch_1.bin: every class occurs, and a class has its own brightness."""
    generator = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count) % classes
    pixels = generator.integers(0, 100, (count, 3072)) + 30 * labels[:, None]
    return np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8).tobytes()


def cifar_files(directory: Path) -> Path:
    """Write small files in the format and under the names of CIFAR-10's binary version."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        (directory / f"data_batch_{number}.bin").write_bytes(cifar_records(40, number))
    (directory / "test_batch.bin").write_bytes(cifar_records(24, 9))
    return directory


def stories(count: int, seed: int) -> list[str]:
    """Return short stories of a few sentences."""
    generator = np.random.Generator(np.random.PCG64(seed))
    texts = [" ".join(generator.choice(WORDS, size=int(generator.integers(8, 60)))) for _ in range(count)]
    return [f"One day, {text}.\nThe end." for text in texts]


def story_files(directory: Path) -> Path:
    """Write small files in the format and under the names of TinyStories' text version."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", stories(200, 1)), ("valid", stories(40, 2))):
        content = "\n<|endoftext|>\n".join(texts)
        (directory / f"TinyStories-{name}.txt").write_text(content, encoding="utf-8")
    return directory


def idx_bytes(values: np.ndarray) -> bytes:
    """Return an idx file of bytes, gzipped."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


@dataclasses.dataclass(frozen=True)
class Makers:
    """Writers of small files in published formats, for test files cannot import each other."""

    cifar_records: Callable[..., bytes] = cifar_records
    cifar_files: Callable[[Path], Path] = cifar_files
    stories: Callable[[int, int], list[str]] = stories
    story_files: Callable[[Path], Path] = story_files
    idx_bytes: Callable[[np.ndarray], bytes] = idx_bytes


@pytest.fixture(scope="session")
def made() -> Makers:
    return Makers()


@pytest.fixture(scope="session")
def task_named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Task]:
    """Return tasks that load their data once: published where that is here, small files for what is published elsewhere."""
    loaded: dict[str, TaskData] = {}
    directory = tmp_path_factory.mktemp("made")

    def load(name: str) -> TaskData:
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("cifar10"):
                cifar_files(directory / "cifar10")
            elif name == "tinystories":
                story_files(directory / "tinystories")
            if name in PUBLISHED:
                patch.setenv("MORPHOGEN_DATA", str(published_directory(PUBLISHED[name]).parent))
            elif name not in ("digits", "mnist1d"):
                patch.setenv("MORPHOGEN_DATA", str(directory))
            return tasks.get(name).load()

    def named(name: str) -> Task:
        home = name.partition("_")[0] if name.startswith("cifar10") else name
        if home not in loaded:
            loaded[home] = load(name)
        return dataclasses.replace(tasks.get(name), load=lambda: loaded[home])

    return named
