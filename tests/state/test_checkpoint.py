"""Checkpoints: whole or refused, with a message that names the file and the reason, and a live run that stays as it was."""

from __future__ import annotations

import hashlib
import io
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
from morphogen.state.events import OptimizerReset
from morphogen.telemetry.events import Event


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


# ---------------------------------------------------------------------------------------------------------- weights only


def weights_directory(run: Any, path: Path) -> Path:
    checkpoint.write(path / "v1", run.state.capture(), version=checkpoint.WEIGHTS, user_data={"a": 1})
    return path / "v1"


def weights_pt(run: Any, path: Path) -> Path:
    torch.save(run.model.state_dict(), path / "w.pt")
    return path / "w.pt"


def weights_legacy(run: Any, path: Path) -> Path:
    torch.save(run.model.state_dict(), path / "w.bin", _use_new_zipfile_serialization=False)
    return path / "w.bin"


def weights_safetensors(run: Any, path: Path) -> Path:
    safetensors.torch.save_model(run.model, str(path / "w.safetensors"))
    return path / "w.safetensors"


@pytest.mark.parametrize("write", [weights_directory, weights_pt, weights_legacy, weights_safetensors])
@pytest.mark.parametrize("optimizer", ["adamw-groups", "muon"])
def test_bare_weights_reset_the_optimizer_and_say_so(kit: Any, tmp_path: Path, write: Any, optimizer: str) -> None:
    source = kit.build(optimizer, "cosine", seed=1)
    source.steps(3)
    path = write(source, tmp_path)
    run, events = kit.build(optimizer, "cosine"), list[Event]()
    state = TrainingState(run.model, run.optimizers, run.schedulers, extras=run.extras, emit=events.append)
    run.steps(2)
    run.model.norm.eval()
    before, identities = run.contents(), run.identities()
    data = state.load(path)
    assert data == ({"a": 1} if path.is_dir() else None)
    now, wanted = run.contents(), source.contents()
    for name, tensor in now["tensors"].items():
        is_here = name == "level" and not path.is_dir()  # no state_dict holds it: the run's own stays
        assert kit.same(tensor, before["tensors"][name] if is_here else wanted["tensors"][name])
    for part in ("ema", "tally", "hidden", "streams", "global", "schedulers", "training", "trainable"):
        assert kit.same(now[part], before[part])
    assert run.identities() == identities
    for part, stepped in run.optimizers.items():
        assert not stepped.state_dict()["state"]
        assert kit.same(now["optimizers"][part]["param_groups"], before["optimizers"][part]["param_groups"])
    reason = "v1_policy_only holds weights and no optimizer state"
    assert events == [OptimizerReset(path=str(path), reason=reason)]
    run.steps(2)


def test_a_run_without_optimizer_loads_weights_without_an_event(kit: Any, tmp_path: Path) -> None:
    source, model, events = kit.build(), kit.net(), list[Event]()
    TrainingState(model, emit=events.append).load(weights_pt(source, tmp_path))
    assert kit.same({**kit.tensors(model), "level": 0}, {**kit.tensors(source.model), "level": 0})
    assert events == []


class Scaled(nn.Linear):
    """Weights with an extra state, as normalising and quantised layers have."""

    scale = 1.0

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "tensor": torch.tensor(self.scale)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = float(state["tensor"])


@pytest.mark.parametrize("form", ["v1", "pt"])
def test_extra_states_are_part_of_the_weights(tmp_path: Path, form: str) -> None:
    source, model = nn.Sequential(Scaled(2, 1)), nn.Sequential(Scaled(2, 1))
    source[0].scale = 3.0
    if form == "v1":
        checkpoint.write(tmp_path / "c", TrainingState(source).capture(), version=checkpoint.WEIGHTS)
    else:
        torch.save(source.state_dict(), tmp_path / "c")
    TrainingState(model).load(tmp_path / "c")
    assert model[0].scale == 3.0
    assert torch.equal(model[0].weight, source[0].weight)


# -------------------------------------------------------------------------------------------------------------- refusals


class Malicious:
    """Unpickling it makes a directory: the least that code inside a checkpoint can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


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


def pickled_data(path: Path) -> Path:
    file = next(path.glob("model-*"))
    file.write_bytes(pickle.dumps(Malicious(path.parent / "marker")))
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
    "pickled data": (pickled_data, r"must have \d+ bytes"),
}


def saved(kit: Any, tmp_path: Path, optimizer: str = "adamw-groups") -> Any:
    """A checkpoint of some steps ago, and the run, trained on since."""
    run = kit.build(optimizer, "sequential")
    run.steps(2)
    run.state.save(tmp_path / "c", user_data={"step": 3})
    run.steps(2)
    return run


def refused(kit: Any, run: Any, path: Path, message: str) -> str:
    """Check that loading ``path`` fails and changes nothing; return the error's text."""
    before, identities, snapshot = run.contents(), run.identities(), run.state.capture()
    with pytest.raises(CheckpointError, match=message) as caught:
        run.state.load(path)
    assert kit.same(run.contents(), before)
    assert run.identities() == identities
    assert run.state.capture().checksum() == snapshot.checksum()
    return str(caught.value)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_file_and_reason(kit: Any, tmp_path: Path, case: str) -> None:
    run = saved(kit, tmp_path)
    damage, message = DAMAGE[case]
    file = damage(tmp_path / "c")
    assert refused(kit, run, tmp_path / "c", message).startswith(f"{file}: ")
    assert not (tmp_path / "marker").exists()
    run.state.save(tmp_path / "c")  # what was damaged can be replaced
    run.state.load(tmp_path / "c")


def test_one_flipped_bit_anywhere_is_refused(kit: Any, tmp_path: Path) -> None:
    run = saved(kit, tmp_path)
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
    run = saved(kit, tmp_path)
    (tmp_path / "empty").mkdir()
    refused(kit, run, tmp_path / path, f"{path}/manifest.json: not found, so there is no checkpoint here")


OTHER_RUNS: dict[str, tuple[tuple[str, str], str]] = {
    "optimizer": (("rmsprop", "sequential"), "optimizer is AdamW, the snapshot's was RMSprop"),
    "scheduler": (("adamw-groups", "cosine"), "scheduler '' is SequentialLR.*, the snapshot's was CosineAnnealingLR"),
    "no scheduler": (("adamw-groups", "none"), "scheduler '' is in the run and missing from the snapshot"),
    "optimizers": (("muon", "sequential"), "optimizer 'matrices' is in the snapshot and missing from the run"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_whole_checkpoint_of_another_run_is_refused(kit: Any, tmp_path: Path, case: str) -> None:
    run = saved(kit, tmp_path)
    arguments, message = OTHER_RUNS[case]
    kit.build(*arguments).state.save(tmp_path / "other")
    assert refused(kit, run, tmp_path / "other", message).startswith(f"{tmp_path / 'other'}: does not fit this run")


def test_weights_of_another_shape_are_refused_by_name(kit: Any, tmp_path: Path) -> None:
    run = saved(kit, tmp_path)
    weights = run.model.state_dict()
    torch.save({**weights, "body.weight": torch.zeros(6, 5)}, tmp_path / "w.pt")
    refused(kit, run, tmp_path / "w.pt", r"w.pt: does not fit this run: .*\n.*`body.weight` is \(6, 6\)")
    del weights["norm.running_mean"]
    torch.save(weights, tmp_path / "w.pt")
    refused(kit, run, tmp_path / "w.pt", "`norm.running_mean` is in the run and missing from the snapshot")
    safetensors.torch.save_file({"alien": torch.ones(1)}, tmp_path / "w.safetensors")
    refused(kit, run, tmp_path / "w.safetensors", "`alien` is in the snapshot and missing from the run")


def test_tied_weights_that_differ_in_the_file_are_refused(kit: Any, tmp_path: Path) -> None:
    run = saved(kit, tmp_path)
    torch.save({**run.model.state_dict(), "head.weight": torch.zeros(7, 6)}, tmp_path / "w.pt")
    refused(kit, run, tmp_path / "w.pt", "`head.weight` and `embed.weight` are one tensor in this model and differ")


def test_bare_weights_fit_no_run_of_several_models(tmp_path: Path) -> None:
    state = TrainingState({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w.pt: bare weights fit a run with one model, got one with 2"):
        state.load(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="`version` must be v2_full_parameters for several models"):
        checkpoint.write(tmp_path / "c", state.capture(), version=checkpoint.WEIGHTS)
    with pytest.raises(ValueError, match="`version` must be v2_full_parameters or v1_policy_only, got 'v9'"):
        checkpoint.write(tmp_path / "c", state.capture(), version="v9")
    assert not (tmp_path / "c").exists()
    checkpoint.write(tmp_path / "c", TrainingState(nn.Linear(1, 1)).capture(), version=checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model 'model\.a' is in the run and missing"):
        state.load(tmp_path / "c")


def _zip_pickle(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


FOREIGN_FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "malicious.pt": (lambda marker: pickle.dumps({"w": Malicious(marker)}, 2), "is not a plain state_dict"),
    "malicious_zip.pt": (lambda marker: _zip_pickle({"w": Malicious(marker)}), "is not a plain state_dict"),
    "malicious.safetensors": (lambda marker: pickle.dumps(Malicious(marker)), "is not a plain state_dict"),
    "module.pt": (lambda marker: _zip_pickle(nn.Linear(1, 1)), "is not a plain state_dict"),
    "number.pt": (lambda marker: _zip_pickle(3), "must hold a dict, got int"),
    "nested.pt": (lambda marker: _zip_pickle({"model": {"w": torch.ones(1)}}), "tensors by name, got dict under 'model'"),
    "numbered.pt": (lambda marker: _zip_pickle({0: torch.ones(1)}), "tensors by name, got Tensor under 0"),
    "empty.pt": (lambda marker: b"", "is not a plain state_dict"),
    "text.pt": (lambda marker: b"hello", "is not a plain state_dict"),
    "cut.pt": (lambda marker: _zip_pickle({"w": torch.ones(99)})[:400], "is not a plain state_dict"),
    "cut.safetensors": (lambda marker: safetensors.torch.save({"w": torch.ones(9)})[:-1], "is not a plain state_dict"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_files_that_are_no_state_dict_are_refused_and_nothing_in_them_runs(kit: Any, tmp_path: Path, name: str) -> None:
    run = saved(kit, tmp_path)
    make, message = FOREIGN_FILES[name]
    content = make(tmp_path / "marker")
    (tmp_path / name).write_bytes(content)
    assert refused(kit, run, tmp_path / name, message).startswith(f"{tmp_path / name}: ")
    assert not (tmp_path / "marker").exists()
    if name.startswith("malicious."):  # the file does what it says in hands less careful
        pickle.loads(content)
        assert (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # where the flipped bit is in the protocol's number
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_state_dict_file_is_refused_or_fits_in_every_case(kit: Any, tmp_path: Path, legacy: bool) -> None:
    """Whatever the damage, nothing but a CheckpointError comes out, and a zip's checksums are compared."""
    run = saved(kit, tmp_path)
    path = (weights_legacy if legacy else weights_pt)(run, tmp_path)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    values = whole.find(run.model.body.weight.detach().numpy().tobytes())
    positions = [int(position) for position in generator.integers(0, len(whole), 60)]
    num_refused = 0
    for index, position in enumerate([values, *positions]):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged[:position] if index % 3 == 2 else damaged)
        try:
            checkpoint.read(path, {"model": run.model})
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            num_refused += 1
        else:
            assert index > 0 or legacy
    assert num_refused > 30


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
    run = saved(kit, tmp_path)
    before = run.contents()
    run.state.save(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "moved")
    run.steps(1)
    run.state.load(tmp_path / "moved")
    assert kit.same(run.contents(), before)
