"""Checkpoints: a directory of safetensors files and a ``manifest.json``, written atomically, trusted after checking.

The manifest is the commit point. Data files are named after their content, written and synced first; then one
``os.replace`` puts the new manifest in place of the old; then data files that it does not name are removed. Killed at
any point, the directory holds either the old checkpoint or the new one, whole. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from morphogen.errors import CheckpointError
from morphogen.state import trees
from morphogen.state.inventory import module_tensors
from morphogen.state.snapshot import PARTS, Snapshot, Tables
from morphogen.telemetry.events import Json
from morphogen.version import __version__

FULL = "v2_full_parameters"
WEIGHTS = "v1_policy_only"
MANIFEST = "manifest.json"
_FORMAT = "morphogen.checkpoint"
_EXTRA_STATE = "_extra_state"
# All that torch's restricted unpickler was seen to raise on damaged files.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError),
    *(AttributeError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile),
    *(UnpicklingError, safetensors.SafetensorError),
)
_UNSAFE = re.compile(r"[^\w.-]")
_OURS = re.compile(r"[\w.-]+-[0-9a-f]{16}\.safetensors|\.(manifest\.json|[\w.-]+-[0-9a-f]{16}\.safetensors)\.tmp")
_LIBRARIES = {
    "morphogen": __version__,
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
        CheckpointError: The disk refused, or a tensor is of a kind that safetensors does not take; what was at ``path``
            still loads.
        TypeError: ``user_data`` is not JSON data.
        ValueError: ``version`` is unknown, or asks for the weights of a single model where there are several.
    """
    if version not in (FULL, WEIGHTS):
        raise ValueError(f"`version` must be {FULL} or {WEIGHTS}, got {version!r}. Leave it out for everything.")
    if version == WEIGHTS and "model" not in snapshot.meta["model"]:
        raise ValueError(f"`version` must be {FULL} for several models, got {version!r}. Leave it out.")
    try:
        json.dumps(user_data)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`user_data` must be JSON data: {error}. Convert it to dicts, lists and numbers.") from error
    directory = Path(path)
    try:
        _make_directory(directory)
        _remove_strays(directory)
        tables = {section: table for section, table in _sections(snapshot, version).items() if table}
        files = {section: _write_table(directory, section, table) for section, table in tables.items()}
        _sync_directory(directory)  # the data must be there for good before a manifest names it
        write_synced(directory / MANIFEST, _as_bytes(_manifest(snapshot, version, files, user_data)))
        _sync_directory(directory)
        _remove_strays(directory)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a full disk, half a file is in everybody's way
            _remove_strays(directory)
        raise CheckpointError(f"{directory}: cannot be written: {error}. A checkpoint that was there loads.") from error


def _sections(snapshot: Snapshot, version: str) -> Tables:
    tables: Tables = {}
    for section, name, tensor in snapshot.named_tensors():
        if version == FULL or section == "model" or (section == "loose" and name.startswith("model.")):
            tables.setdefault(section, {})[name] = tensor
    return tables


def _write_table(directory: Path, section: str, table: Mapping[str, Tensor]) -> dict[str, Json]:
    try:
        content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in table.items()})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: cannot be written: safetensors refuses a tensor of {section!r}: {error}. Convert it, or leave "
            "it out of the run. A checkpoint that was there loads."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    name = f"{_UNSAFE.sub('_', section)}-{digest[:16]}.safetensors"
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
    """Remove a checkpoint directory written by :func:`write`, the manifest first: no half of it can be loaded.

    Raises:
        CheckpointError: It is not there, or the disk refused, or files that are not ours are in it; those stay.
    """
    directory = Path(path)
    try:
        (directory / MANIFEST).unlink(missing_ok=True)
        _remove_strays(directory)
        directory.rmdir()
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be removed: {error}. Remove what is left by hand.") from error


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        _sync_directory(directory.parent)


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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # a damaged manifest names nothing: its data may still be worth something to a person
    for file in directory.iterdir():
        if file.name not in kept and _OURS.fullmatch(file.name):
            file.unlink()


def _manifest(snapshot: Snapshot, version: str, files: Mapping[str, Json], user_data: Json) -> dict[str, Json]:
    full = version == FULL
    meta = snapshot.meta if full else {"model": {"model": _weights_meta(snapshot.meta["model"]["model"])}}
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "version": version,
        "files": dict(files),
        "libraries": _LIBRARIES,
        "parts": {f"has_{part}_state": full and part in snapshot.parts for part in PARTS},
        "meta": dict(meta),
        "user_data": user_data,
    }
    manifest = json.loads(json.dumps(manifest))  # as a reader will see it: text keys, no tuples
    return {**manifest, "sha256": _digest_of(manifest)}


def _weights_meta(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("aliases", "topology", "extra_state") if key in model}


def _as_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


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
    tables: Tables = {section: _read_table(source / entry["file"], entry) for section, entry in manifest["files"].items()}
    loose = tables.pop("loose", {})
    return Loaded(Snapshot(tables, loose, manifest["meta"]), manifest["version"], manifest["user_data"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found, so there is no checkpoint here. Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}): damaged or cut off. Use another checkpoint.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not a morphogen checkpoint manifest. Check the path.")
    if manifest.get("version") not in (FULL, WEIGHTS):
        raise CheckpointError(
            f"{path}: version must be {FULL} or {WEIGHTS}, got {manifest.get('version')!r}. "
            "Load it with the release of morphogen that wrote it."
        )
    if manifest.get("sha256") != _digest_of(manifest) or content != _as_bytes(manifest):
        raise CheckpointError(f"{path}: its own sha256 does not match: damaged or edited. Use another checkpoint.")
    return manifest


def _read_table(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. The checkpoint is not whole.") from error
    if len(content) != entry["bytes"]:
        raise CheckpointError(f"{path}: must have {entry['bytes']} bytes, got {len(content)}: cut off. Use another checkpoint.")
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path}: its sha256 does not match the manifest: damaged. Use another checkpoint.")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is not what safetensors writes: {error}. Use another checkpoint.") from error


def _bare_snapshot(path: Path, modules: Mapping[str, nn.Module]) -> Snapshot:
    models = [part for part in modules if not part.startswith("extras.")]
    if models != ["model"]:
        raise CheckpointError(
            f"{path}: bare weights fit a run with one model, got one with {len(models)}. Use a {FULL} checkpoint."
        )
    live = module_tensors(modules["model"])
    tensors: dict[str, Tensor] = {}
    extra_state: dict[str, Json] = {}
    loose: trees.TensorTable = {}
    for name, value in _read_bare(path).items():
        module, _, last = name.rpartition(".")
        if last == _EXTRA_STATE:
            extra_state[module] = trees.encode(value, loose, f"model.extra_state.{module}")
            continue
        first = live.aliases.get(name, name)
        if first in tensors and not torch.equal(tensors[first], value):
            raise CheckpointError(
                f"{path}: `{name}` and `{first}` are one tensor in this model and differ in the file. Use a file of this model."
            )
        tensors[first] = value
    persistent = set(modules["model"].state_dict())
    for name, tensor in live.tensors.items():
        if name not in persistent:
            tensors.setdefault(name, tensor.detach().clone())
    meta = {"aliases": {}, "topology": None, "extra_state": extra_state}
    return Snapshot({"model": tensors}, loose, {"model": {"model": meta}})


def _check_sums(path: Path) -> None:
    """Compare the CRC of each record of a zip, as ``torch.save`` writes it; ``torch.load`` does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match: damaged.")


def _read_bare(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            _check_sums(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(f"{path}: is not a plain state_dict: {reason} Nothing in it was run.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold a dict, got {type(content).__name__}. Save model.state_dict().")
    for name, value in cast("Mapping[Any, Any]", content).items():
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.endswith(_EXTRA_STATE)):
            raise CheckpointError(
                f"{path}: must hold a dict of tensors by name, got {type(value).__name__} under {name!r}. "
                "Save model.state_dict()."
            )
    return dict(content)
