"""Checkpoints: a directory of safetensors files and a ``manifest.json``, written atomically, trusted only after checking.

The manifest is the commit point. Data files are named after their content, written and synced first; then one ``os.replace``
puts the new manifest in place of the old; then files that no manifest names are removed. Killed at any point, the directory
holds either the old checkpoint or the new one, whole. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle  # noqa: S403 - only to name the error torch raises when it refuses a pickle
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import morphogen
from morphogen.errors import CheckpointError
from morphogen.state.inventory import module_tensors
from morphogen.state.snapshot import Snapshot, Tables
from morphogen.telemetry.events import Json

FULL = "v2_full_parameters"
WEIGHTS = "v1_policy_only"
MANIFEST = "manifest.json"
_FORMAT = "morphogen.checkpoint"
_LIBRARIES = {
    "morphogen": morphogen.__version__,
    "torch": torch.__version__,
    "safetensors": safetensors.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and checked."""

    snapshot: Snapshot
    version: str
    user_data: Json


def write(path: str | os.PathLike[str], snapshot: Snapshot, *, version: str = FULL, user_data: Json = None) -> None:
    """Write ``snapshot`` to the directory ``path``; an older checkpoint there stays whole until the new one is.

    Args:
        path: Directory, made if missing.
        snapshot: What to write.
        version: ``v2_full_parameters``, or ``v1_policy_only`` for the weights of a single model alone.
        user_data: JSON data kept in the manifest.

    Raises:
        CheckpointError: The disk refused; what was at ``path`` still loads.
        ValueError: ``version`` is unknown.
    """
    if version not in (FULL, WEIGHTS):
        raise ValueError(f"`version` must be {FULL} or {WEIGHTS}, got {version!r}. Leave it out for everything.")
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_strays(directory)
        files = {
            section: _write_table(directory, section, table)
            for section, table in _sections(snapshot, version).items()
            if table
        }
        manifest = _manifest(snapshot, version, files, user_data)
        write_synced(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_directory(directory)
        _remove_strays(directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}. What was there before still loads.") from error


def _sections(snapshot: Snapshot, version: str) -> Tables:
    tables: Tables = {}
    for section, name, tensor in snapshot.named_tensors():
        if version == FULL or section == "model":
            tables.setdefault(section, {})[name] = tensor
    return tables


def _write_table(directory: Path, section: str, table: Mapping[str, Tensor]) -> dict[str, Json]:
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in table.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{section}-{digest[:16]}.safetensors"
    write_synced(directory / name, content)
    return {"file": name, "sha256": digest, "bytes": len(content)}


def write_synced(path: Path, content: bytes) -> None:
    """Write beside ``path``, sync, and move into place: ``path`` never holds half of ``content``."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint directory written by :func:`write`: the manifest first, so that no half of it can be loaded."""
    directory = Path(path)
    (directory / MANIFEST).unlink(missing_ok=True)
    _remove_strays(directory)
    directory.rmdir()


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened, and the rename is durable without it
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_strays(directory: Path) -> None:
    """Remove our own leftovers: temporary files, and data files that the present manifest does not name."""
    kept = {MANIFEST}
    manifest = directory / MANIFEST
    if manifest.exists():
        try:
            kept |= {entry["file"] for entry in json.loads(manifest.read_text())["files"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a damaged manifest names nothing: its data may still be worth something to a person
    for file in directory.iterdir():
        ours = file.suffix == ".safetensors" or (file.name.startswith(".") and file.suffix == ".tmp")
        if ours and file.name not in kept:
            file.unlink()


def _manifest(snapshot: Snapshot, version: str, files: Mapping[str, Json], user_data: Json) -> dict[str, Json]:
    full = version == FULL
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "version": version,
        "files": dict(files),
        "libraries": _LIBRARIES,
        "parts": {f"has_{part}_state": part in snapshot.parts for part in ("optimizer", "scheduler", "scaler", "extras")}
        if full
        else {"has_optimizer_state": False},
        "meta": dict(snapshot.meta) if full else {"model": {"model": snapshot.meta["model"]["model"]}},
        "user_data": user_data,
    }
    return {**manifest, "sha256": _digest_of(manifest)}


def _digest_of(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(path: str | os.PathLike[str], modules: Mapping[str, nn.Module]) -> Loaded:
    """Read a checkpoint directory or a bare ``state_dict`` file, and check sizes, digests and version.

    Args:
        path: A directory written by :func:`write`, a ``.safetensors`` file, or a file written by ``torch.save(state_dict)``.
        modules: The live modules by section; bare weights need them to find tied and non-persistent tensors.

    Raises:
        CheckpointError: Naming the file and the reason.
    """
    source = Path(path)
    if source.is_file():
        return Loaded(_bare_snapshot(source, modules), WEIGHTS, None)
    manifest = _read_manifest(source / MANIFEST)
    tables: Tables = {
        section: _read_table(source / entry["file"], entry) for section, entry in manifest["files"].items()
    }
    loose = tables.pop("loose", {})
    return Loaded(Snapshot(tables, loose, manifest["meta"]), manifest["version"], manifest["user_data"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found, so there is no checkpoint here. Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}): damaged or cut off. Use another checkpoint.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not a morphogen checkpoint manifest. Check the path.")
    if manifest.get("version") not in (FULL, WEIGHTS):
        raise CheckpointError(
            f"{path}: version must be {FULL} or {WEIGHTS}, got {manifest.get('version')!r}. "
            "Load it with the release of morphogen that wrote it."
        )
    if manifest.get("sha256") != _digest_of(manifest):
        raise CheckpointError(f"{path}: its own sha256 does not match: damaged or edited. Use another checkpoint.")
    return manifest


def _read_table(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. The checkpoint is not whole.") from error
    if len(content) != entry["bytes"]:
        raise CheckpointError(f"{path}: must have {entry['bytes']} bytes, got {len(content)}: cut off. Use another one.")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path}: its sha256 does not match the manifest: damaged. Use another checkpoint.")
    return safetensors.torch.load(content)


def _bare_snapshot(path: Path, modules: Mapping[str, nn.Module]) -> Snapshot:
    if list(modules) != ["model"] and [name for name in modules if name.startswith("model")] != ["model"]:
        raise CheckpointError(f"{path}: bare weights fit a run with one model, this one has {len(modules)}. Use a full one.")
    live = module_tensors(modules["model"])
    weights = _read_bare(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        first = live.aliases.get(name, name)
        if first in tensors and not torch.equal(tensors[first], tensor):
            raise CheckpointError(f"{path}: `{name}` and `{first}` are one tensor in this model and differ in the file.")
        tensors[first] = tensor
    persistent = set(modules["model"].state_dict())
    for name, tensor in live.tensors.items():
        if name not in persistent:
            tensors.setdefault(name, tensor.detach().clone())
    return Snapshot({"model": tensors}, {}, {"model": {"model": {"aliases": {}, "topology": None}}})


def _read_bare(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: is not a plain state_dict: {reason} Nothing in it was run.") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: must hold a dict of tensors, got {type(content).__name__}. Save model.state_dict().")
    return dict(content)
