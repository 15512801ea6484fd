"""Checkpoints: whole or refused, with a message that names the file and the reason, and a live run that stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from morphogen.errors import CheckpointError
from morphogen.state import TrainingState, checkpoint


@pytest.mark.parametrize("schedule", ["cosine", "sequential"])
def test_a_fresh_run_goes_on_bit_identically(kit: Any, tmp_path: Path, any_optimizer: str, schedule: str) -> None:
    run = kit.build(any_optimizer, schedule)
    run.steps(3)
    assert run.state.save(tmp_path / "c") is None
    expected, after = run.steps(3), run.contents()
    fresh = kit.build(any_optimizer, schedule, seed=5)
    fresh.steps(1)
    identities = fresh.identities()
    assert fresh.state.load(tmp_path / "c") is None
    assert {**fresh.identities(), "members": 0} == {**identities, "members": 0}
    assert fresh.steps(3) == expected
    assert kit.same(fresh.contents(), after)
    fresh.state.verify()


def test_a_run_that_never_stepped_is_loaded_into_one_that_did(kit: Any, tmp_path: Path) -> None:
    run = kit.build("adam", "onecycle")
    run.state.save(tmp_path / "c")
    before = run.contents()
    other = kit.build("adam", "onecycle", seed=3)
    other.steps(2)
    other.state.load(str(tmp_path / "c"))
    assert kit.same(other.contents(), before)


def test_names_models_and_layouts_of_every_kind_survive(kit: Any, tmp_path: Path) -> None:
    def made(seed: int) -> tuple[dict[str, nn.Module], TrainingState]:
        torch.manual_seed(seed)
        models = {"actor": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "a/c": nn.BatchNorm2d(4)}
        models["actor"].register_buffer("nothing", torch.zeros(0, 2))
        models["actor"].register_buffer("narrow", torch.rand(3).bfloat16())
        parameters = [p for model in models.values() for p in model.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0 + seed)
        extras = {"norm/obs.mean": nn.BatchNorm1d(2), "h/0": torch.rand(2)}
        return models, TrainingState(models, optimizer, scaler=scaler, extras=extras)

    def train(models: dict[str, nn.Module], state: TrainingState) -> list[dict[str, torch.Tensor]]:
        for step in range(2):
            images = torch.full((2, 3, 5, 5), 0.1 * step + 0.1).contiguous(memory_format=torch.channels_last)
            models["a/c"](models["actor"](images)).square().sum().backward()
            state.optimizers[""].step()
            state.optimizers[""].zero_grad()
        return [kit.tensors(model) for model in models.values()]

    (models, state), (fresh_models, fresh) = made(0), made(1)
    train(models, state)
    state.save(tmp_path / "c")
    expected = train(models, state)
    fresh.load(tmp_path / "c")
    assert fresh.scalers[""].get_scale() == 64.0
    assert kit.same(train(fresh_models, fresh), expected)


def test_user_data_comes_back_as_json_data(tmp_path: Path) -> None:
    state = TrainingState(nn.Linear(2, 1))
    numbered = {number: None for number in range(12)}
    data = {"step": 3, "loss": [0.1, None, "naïve\n"], "huge": 2**80, "small": 1e-5, "by_number": numbered, "pair": (1, 2)}
    state.save(tmp_path / "c", user_data=data)
    expected = {**data, "by_number": {str(number): None for number in range(12)}, "pair": [1, 2]}
    assert state.load(tmp_path / "c") == expected


@pytest.mark.parametrize("bad", [{"path": Path()}, torch.ones(1), {(1, 2): 3}, {1, 2}], ids=repr)
def test_user_data_that_is_not_json_is_refused_and_the_old_checkpoint_stays(tmp_path: Path, bad: Any) -> None:
    state = TrainingState(nn.Linear(2, 1))
    state.save(tmp_path / "c", user_data=1)
    files = sorted(os.listdir(tmp_path / "c"))
    with pytest.raises(TypeError, match="`user_data` must be JSON data"):
        state.save(tmp_path / "c", user_data=bad)
    assert sorted(os.listdir(tmp_path / "c")) == files
    assert state.load(tmp_path / "c") == 1


def test_the_manifest_says_what_is_inside(kit: Any, tmp_path: Path) -> None:
    run = kit.build("adam", "cosine")
    run.steps(1)
    run.state.save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["format"] == "morphogen.checkpoint"
    assert manifest["version"] == "v2_full_parameters"
    assert manifest["libraries"]["torch"] == torch.__version__
    assert manifest["parts"]["has_optimizer_state"] is manifest["parts"]["has_scheduler_state"] is True
    assert manifest["parts"]["has_scaler_state"] is False
    assert set(manifest["files"]) == {"model", "optimizer", "extras.ema", "tensors", "loose"}
    for entry in manifest["files"].values():
        content = (tmp_path / "c" / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert set(os.listdir(tmp_path / "c")) == {"manifest.json", *(entry["file"] for entry in manifest["files"].values())}


def test_a_new_save_replaces_the_old_and_leaves_files_of_others(kit: Any, tmp_path: Path) -> None:
    run, others = kit.build("adam"), ("bert.safetensors", ".draft.tmp", "notes.txt", "model-final.safetensors")
    for name in others:
        (tmp_path / name).write_text("mine")
    for _ in range(3):
        run.steps(1)
        run.state.save(tmp_path)
        assert len(os.listdir(tmp_path)) == len(others) + 6
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    checkpoint_files = set(os.listdir(tmp_path)) - set(others)
    with pytest.raises(CheckpointError, match="cannot be removed"):
        checkpoint.remove(tmp_path)  # ours are gone, the directory and what else is in it stays
    assert set(os.listdir(tmp_path)) == set(others)
    assert checkpoint_files
    run.state.save(tmp_path / "c")
    checkpoint.remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def truncated(path: Path) -> Path:
    file = next(path.glob("optimizer-*"))
    file.write_bytes(file.read_bytes()[:-7])
    return file


def appended(path: Path) -> Path:
    file = next(path.glob("model-*"))
    file.write_bytes(file.read_bytes() + b"\0")
    return file


def removed(path: Path) -> Path:
    file = next(path.glob("loose-*"))
    file.unlink()
    return file


def cut_manifest(path: Path) -> Path:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])
    return file


def no_manifest(path: Path) -> Path:
    (path / "manifest.json").unlink()
    return path / "manifest.json"


def nested_manifest(path: Path) -> Path:
    (path / "manifest.json").write_text("[" * 100_000)
    return path / "manifest.json"


def rewritten(change: Callable[[dict[str, Any]], object], signed: bool = True) -> Callable[[Path], Path]:
    """Change the manifest as somebody with an editor, and the patience to compute the digest again, would."""

    def change_file(path: Path) -> Path:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if signed:
            manifest["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
        return path / "manifest.json"

    return change_file


def swapped(path: Path) -> Path:
    """The model's file of another checkpoint, whole in itself."""
    tensors = {"w": torch.ones(1)}
    file = next(path.glob("model-*"))
    file.write_bytes(safetensors.torch.save(tensors))
    return file


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, r"must have \d+ bytes, got \d+: cut off"),
    "appended": (appended, r"must have \d+ bytes, got \d+"),
    "removed": (removed, "cannot be read: .*No such file"),
    "cut manifest": (cut_manifest, "is not JSON .*: damaged or cut off"),
    "no manifest": (no_manifest, "not found, so there is no checkpoint here"),
    "nested manifest": (nested_manifest, "is not JSON"),
    "edited manifest": (rewritten(lambda m: m["user_data"].update(step=4), signed=False), "its own sha256 does not match"),
    "other version": (
        rewritten(lambda m: m.update(version="v3_sharded")),
        "version must be v2_full_parameters or v1_policy_only, got 'v3_sharded'",
    ),
    "other format": (rewritten(lambda m: m.update(format="something else")), "is not a morphogen checkpoint manifest"),
    "a list": (lambda path: (path / "manifest.json").write_text("[1]") and path / "manifest.json", "is not a morphogen"),
    "swapped": (swapped, r"must have \d+ bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_file_and_reason(kit: Any, tmp_path: Path, case: str) -> None:
    run = kit.saved(tmp_path)
    damage, message = DAMAGE[case]
    file = damage(tmp_path / "c")
    assert kit.refused(run, tmp_path / "c", message).startswith(f"{file}: ")
    assert not (tmp_path / "marker").exists()
    run.state.save(tmp_path / "c")  # what was damaged can be replaced
    run.state.load(tmp_path / "c")


def test_a_pickle_in_place_of_data_is_not_run(kit: Any, tmp_path: Path) -> None:
    run = kit.saved(tmp_path)
    file = next((tmp_path / "c").glob("model-*"))
    content = pickle.dumps(kit.malicious(tmp_path / "marker"))
    file.write_bytes(content)
    kit.refused(run, tmp_path / "c", r"model-.*: must have \d+ bytes")
    entry = {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewritten(lambda manifest: manifest["files"].update(model=entry))(tmp_path / "c")
    kit.refused(run, tmp_path / "c", "model-.*: is not what safetensors writes")
    assert not (tmp_path / "marker").exists()


def test_one_flipped_bit_anywhere_is_refused(kit: Any, tmp_path: Path) -> None:
    run = kit.saved(tmp_path)
    generator = np.random.default_rng(0)
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        count = 120 if file.name == "manifest.json" else 25
        for position in [0, len(whole) - 1, *generator.integers(0, len(whole), count)]:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="manifest.json: |does not match the manifest"):
                run.state.load(tmp_path / "c")
        file.write_bytes(whole)
    before = run.contents()
    run.state.load(tmp_path / "c")
    assert not kit.same(run.contents(), before)


def test_a_flip_that_json_does_not_see_is_refused_too(tmp_path: Path) -> None:
    state = TrainingState(nn.Linear(2, 1))
    state.save(tmp_path / "c", user_data=1e-5)
    file = tmp_path / "c" / "manifest.json"
    whole = file.read_text()
    assert "1e-05" in whole
    file.write_text(whole.replace("1e-05", "1E-05"))
    with pytest.raises(CheckpointError, match="its own sha256 does not match"):
        state.load(tmp_path / "c")


@pytest.mark.parametrize("path", ["nowhere", "c/nowhere", "empty"])
def test_a_missing_checkpoint_is_refused(kit: Any, tmp_path: Path, path: str) -> None:
    run = kit.saved(tmp_path)
    (tmp_path / "empty").mkdir()
    kit.refused(run, tmp_path / path, f"{path}/manifest.json: not found, so there is no checkpoint here")


OTHER_RUNS: dict[str, tuple[tuple[str, str], str]] = {
    "optimizer": (("rmsprop", "sequential"), "optimizer is AdamW, the snapshot's was RMSprop"),
    "scheduler": (("adamw-groups", "cosine"), "scheduler '' is SequentialLR.*, the snapshot's was CosineAnnealingLR"),
    "no scheduler": (("adamw-groups", "none"), "scheduler '' is in the run and missing from the snapshot"),
    "optimizers": (("muon", "sequential"), "optimizer 'matrices' is in the snapshot and missing from the run"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_whole_checkpoint_of_another_run_is_refused(kit: Any, tmp_path: Path, case: str) -> None:
    run = kit.saved(tmp_path)
    arguments, message = OTHER_RUNS[case]
    kit.build(*arguments).state.save(tmp_path / "other")
    assert kit.refused(run, tmp_path / "other", message).startswith(f"{tmp_path / 'other'}: does not fit this run")


def test_a_tensor_that_safetensors_does_not_take_is_refused_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    state = TrainingState(model)
    state.save(tmp_path / "c", user_data="old")
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="c: cannot be written: safetensors refuses a tensor of 'model'.*complex128"):
        state.save(tmp_path / "c", user_data="new")
    del model.wave
    assert state.load(tmp_path / "c") == "old"


def test_a_checkpoint_may_be_moved_and_copied(kit: Any, tmp_path: Path) -> None:
    run = kit.saved(tmp_path)
    before = run.contents()
    run.state.save(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "moved")
    run.steps(1)
    run.state.load(tmp_path / "moved")
    assert kit.same(run.contents(), before)


def test_a_snapshot_has_the_same_checksum_in_files(kit: Any, tmp_path: Path, any_optimizer: str) -> None:
    run = kit.build(any_optimizer, "cosine")
    run.steps(3)
    snapshot = run.state.capture()
    checkpoint.write(tmp_path / "c", snapshot)
    assert checkpoint.read(tmp_path / "c", {}).snapshot.checksum() == snapshot.checksum()
