"""TinyStories' loader, on small files in the published formats, and the cache of its tokens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphogen.errors import DataError
from morphogen.tasks import Task, tinystories, tokens
from morphogen.tasks.tokens import PADDING, ByteTokenizer, FileTokenizer, TokenFile

END = ByteTokenizer.vocab_size - 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path, made: Any) -> Path:
    return made.story_files(tmp_path / "texts")


def told(stream: list[int]) -> list[str]:
    """Return the stories in a stream of byte tokens, padding left out."""
    content = bytes(token - 1 if token != END else 0 for token in stream if token != PADDING)
    return [story.decode() for story in content.split(b"\0")]


def stream_of(split: Any) -> list[int]:
    """Return the tokens of a split in their order, the last target included."""
    return [*split.inputs.flatten().tolist(), int(split.targets[-1, -1])]


def test_every_story_is_there_in_its_order(texts: Path, made: Any) -> None:
    found = tinystories.load(texts)
    assert found.num_classes == 258
    stream = stream_of(found.train)[:-1] + stream_of(found.decision)
    assert told(stream) == [*made.stories(200, 1), ""]
    assert told(stream_of(found.test)) == [*made.stories(40, 2), ""]
    assert len(found.decision) == (len(found.train) + len(found.decision)) // 10


def test_rows_lie_in_a_mapped_file_and_come_as_int64(texts: Path, cache: Path) -> None:
    found = tinystories.load(texts)
    assert found.train.inputs.dtype == torch.int16
    inputs, targets = found.train.rows(torch.tensor([0, 3]))
    assert inputs.shape == targets.shape == (2, 128)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    if Path("/proc/self/maps").exists():
        assert str(next(cache.glob("tinystories-train-*.bin"))) in Path("/proc/self/maps").read_text()
    sizes = sorted(path.stat().st_size for path in cache.glob("*.bin"))
    assert sizes[0] % 2 == 0 and (sizes[0] // 2 - 1) % 128 == 0


def test_the_padding_at_the_end_is_not_learned(texts: Path, made: Any) -> None:
    found = tinystories.load(texts)
    last = found.test.rows(slice(len(found.test) - 1, None))
    padded = last[1] == PADDING
    assert padded.any() and not padded.all()
    objective = tinystories.TASK.objective
    logits = torch.randn(1, 128, 258)
    changed = torch.where(padded[..., None], torch.randn(1, 128, 258), logits)
    assert torch.equal(objective.loss(logits, last[1]), objective.loss(changed, last[1]))
    assert torch.equal(objective.per_sample(logits, last[1]), objective.per_sample(changed, last[1]))


def test_stories_are_tokenised_once(texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tinystories.load(texts)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode", lambda self, document: pytest.fail("tokenised again"))
        second = tinystories.load(texts)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    changed = texts / "TinyStories-train.txt"
    changed.write_text("\n<|endoftext|>\n".join(["Another story."] * 400), encoding="utf-8")
    os.utime(changed, ns=(0, time.time_ns()))
    assert told(stream_of(tinystories.load(texts).train))[0] == "Another story."


def test_marks_that_lie_across_two_reads_part_stories(texts: Path, monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    monkeypatch.setattr(tinystories, "_READ_CHARACTERS", 5)
    assert told(stream_of(tinystories.load(texts).test)) == [*made.stories(40, 2), ""]


def test_many_stories_are_written_in_pieces(texts: Path, monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_TOKENS", 100)
    assert told(stream_of(tinystories.load(texts).test)) == [*made.stories(40, 2), ""]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_hugging_face_data_set_is_the_same_data(kind: str, texts: Path, tmp_path: Path, made: Any) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    place = tmp_path / "hugging"
    for split, stories in (("train", made.stories(200, 1)), ("validation", made.stories(40, 2))):
        table = datasets.Dataset.from_dict({"text": stories})
        if kind == "arrow":
            table.save_to_disk(place / split)
        else:
            (place / "data").mkdir(parents=True, exist_ok=True)
            half = len(stories) // 2
            for number, rows in enumerate((range(half), range(half, len(stories)))):
                table.select(rows).to_parquet(place / "data" / f"{split}-0000{number}-of-00002-abc.parquet")
    ours, theirs = tinystories.load(place), tinystories.load(texts)
    for mine, other in zip(ours.splits().values(), theirs.splits().values(), strict=True):
        assert torch.equal(mine.inputs, other.inputs) and torch.equal(mine.targets, other.targets)


def test_a_data_set_without_text_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"story": ["a"]}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="train-00000-of-00001.parquet: must have the columns text, has story"):
        tinystories.load(tmp_path)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE(unk_token=None))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the little dog ran home", "the cat sat and the dog sat"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_of_ones_own(texts: Path, tokenizer_file: Path, made: Any) -> None:
    library = pytest.importorskip("tokenizers")
    original = library.Tokenizer.from_file(str(tokenizer_file))
    original.decoder = library.decoders.ByteLevel()
    found = tinystories.load(texts, tokenizer_file)
    assert found.num_classes == original.get_vocab_size() + 1
    stream = [token - 1 for token in stream_of(found.test) if token != PADDING]
    assert original.token_to_id("<|endoftext|>") == stream[-1]
    assert original.decode(stream, skip_special_tokens=False) == "".join(
        f"{story}<|endoftext|>" for story in made.stories(40, 2)
    )
    assert len(stream) < sum(len(story) + 1 for story in made.stories(40, 2)), "nothing was merged"
    task = tinystories.task(texts, tokenizer_file)
    assert task.build().model.host.tokens.weight.shape[0] == found.num_classes


@pytest.mark.parametrize("content", ["{}", "no json", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json: cannot be read as a tokenizer.json"):
        tinystories.load(texts, tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_is_refused(tokenizer_file: Path, texts: Path) -> None:
    tokenizer_file.write_text(tokenizer_file.read_text().replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(DataError, match="must have the token <|endoftext|>"):
        FileTokenizer(tokenizer_file)


def test_stories_that_are_no_text_or_too_few_are_refused(texts: Path) -> None:
    train = texts / "TinyStories-train.txt"
    train.write_bytes(b"\xff\xfe broken")
    with pytest.raises(DataError, match="TinyStories-train.txt: must be UTF-8 text"):
        tinystories.load(texts)
    train.write_text("One short story.")
    with pytest.raises(DataError, match="must hold at least 10 rows of 128 tokens"):
        tinystories.load(texts)
    train.write_text(" <|endoftext|> \n<|endoftext|>")
    with pytest.raises(DataError, match="must hold at least one text"):
        tinystories.load(texts)


def test_a_failure_half_way_leaves_nothing_behind(texts: Path, cache: Path) -> None:
    (texts / "TinyStories-train.txt").write_bytes(b"A story.<|endoftext|>" * 300_000 + b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        tinystories.load(texts)
    assert list(cache.iterdir()) == []


def spoil_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "must have .* bytes, has"),
        (lambda path: path.with_suffix(".json").unlink(), "cannot be read"),
        (spoil_manifest, "cannot be read"),
    ],
)
def test_damaged_tokens_are_named(spoil: Callable[[Path], object], words: str, texts: Path, cache: Path) -> None:
    tinystories.load(texts)
    path = next(cache.glob("tinystories-train-*.bin"))
    spoil(path)
    with pytest.raises(DataError, match=f"{path.name}: {words}.* Delete it"):
        tinystories.load(texts)
    path.unlink()
    tinystories.load(texts)


def test_where_nothing_can_be_written_that_is_said(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be kept.*Set MORPHOGEN_DATA"):
        tinystories.load(texts)


def test_writing_to_mapped_tokens_does_not_reach_the_file(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "some.bin")
    file.write(["ab"], ByteTokenizer(), 4)
    found = file.read()
    assert found.tolist() == [98, 99, 257, PADDING, PADDING]
    found[0] = 5
    assert file.read().tolist()[0] == 98
    assert json.loads((tmp_path / "some.json").read_text())["num_tokens"] == 5


def test_a_large_vocabulary_is_written_in_wider_numbers(tmp_path: Path) -> None:
    class Wide:
        vocab_size, identity = 50_000, "wide"

        def encode(self, document: str) -> np.ndarray:
            return np.array([49_999, 1], dtype=np.int64)

    file = TokenFile(tmp_path / "some.bin")
    file.write(["x"], Wide(), 1)
    assert file.read().dtype == torch.int32
    assert file.read().tolist() == [49_999, 1]


def test_the_task_trains(task_named: Callable[[str], Task]) -> None:
    built = task_named("tinystories").build(full_size=True)
    inputs, targets = built.data.train.rows(slice(32))
    losses: list[float] = []
    for _ in range(8):
        built.optimizer.zero_grad()
        loss = built.task.loss(built.model(inputs), targets)
        loss.backward()
        built.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
