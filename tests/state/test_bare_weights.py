"""Bare weights: a ``state_dict`` in any form is loaded and the optimizer reset; what is none is refused, and never run."""

from __future__ import annotations

import io
import pickle
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


def test_weights_of_another_shape_are_refused_by_name(kit: Any, tmp_path: Path) -> None:
    run = kit.saved(tmp_path)
    weights = run.model.state_dict()
    torch.save({**weights, "body.weight": torch.zeros(6, 5)}, tmp_path / "w.pt")
    kit.refused(run, tmp_path / "w.pt", r"w.pt: does not fit this run: .*\n.*`body.weight` is \(6, 6\)")
    del weights["norm.running_mean"]
    torch.save(weights, tmp_path / "w.pt")
    kit.refused(run, tmp_path / "w.pt", "`norm.running_mean` is in the run and missing from the snapshot")
    safetensors.torch.save_file({"alien": torch.ones(1)}, tmp_path / "w.safetensors")
    kit.refused(run, tmp_path / "w.safetensors", "`alien` is in the snapshot and missing from the run")


def test_tied_weights_that_differ_in_the_file_are_refused(kit: Any, tmp_path: Path) -> None:
    run = kit.saved(tmp_path)
    torch.save({**run.model.state_dict(), "head.weight": torch.zeros(7, 6)}, tmp_path / "w.pt")
    kit.refused(run, tmp_path / "w.pt", "`head.weight` and `embed.weight` are one tensor in this model and differ")


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


FOREIGN_FILES: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "malicious.pt": (lambda evil: pickle.dumps({"w": evil}, 2), "is not a plain state_dict"),
    "malicious_zip.pt": (lambda evil: _zip_pickle({"w": evil}), "is not a plain state_dict"),
    "malicious.safetensors": (lambda evil: pickle.dumps(evil), "is not a plain state_dict"),
    "module.pt": (lambda evil: _zip_pickle(nn.Linear(1, 1)), "is not a plain state_dict"),
    "number.pt": (lambda evil: _zip_pickle(3), "must hold a dict, got int"),
    "nested.pt": (lambda evil: _zip_pickle({"model": {"w": torch.ones(1)}}), "tensors by name, got dict under 'model'"),
    "numbered.pt": (lambda evil: _zip_pickle({0: torch.ones(1)}), "tensors by name, got Tensor under 0"),
    "empty.pt": (lambda evil: b"", "is not a plain state_dict"),
    "text.pt": (lambda evil: b"hello", "is not a plain state_dict"),
    "cut.pt": (lambda evil: _zip_pickle({"w": torch.ones(99)})[:400], "is not a plain state_dict"),
    "cut.safetensors": (lambda evil: safetensors.torch.save({"w": torch.ones(9)})[:-1], "is not a plain state_dict"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_files_that_are_no_state_dict_are_refused_and_nothing_in_them_runs(kit: Any, tmp_path: Path, name: str) -> None:
    run = kit.saved(tmp_path)
    make, message = FOREIGN_FILES[name]
    content = make(kit.malicious(tmp_path / "marker"))
    (tmp_path / name).write_bytes(content)
    assert kit.refused(run, tmp_path / name, message).startswith(f"{tmp_path / name}: ")
    assert not (tmp_path / "marker").exists()
    if name.startswith("malicious."):  # the file does what it says in hands less careful
        pickle.loads(content)
        assert (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # where the flipped bit is in the protocol's number
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_state_dict_file_is_refused_or_fits_in_every_case(kit: Any, tmp_path: Path, legacy: bool) -> None:
    """Whatever the damage, nothing but a CheckpointError comes out, and a zip's checksums are compared."""
    run = kit.saved(tmp_path)
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
