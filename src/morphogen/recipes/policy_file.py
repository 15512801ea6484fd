"""Trained policies as files: weights and observation normaliser in one safetensors file, all facts as JSON in its header."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from morphogen.control import Op
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.choices import ALPHA_CURVES, ALPHA_SPEEDS_TICKS, ALPHA_TARGETS, STYLES, TEMPOS_TICKS, Layout
from morphogen.envs.learned import LearnedPolicy, Origin, sample_observations
from morphogen.envs.observation import feature_names
from morphogen.errors import CheckpointError
from morphogen.recipes.run_directory import write_bytes
from morphogen.rl.actions import ActionConfig, make
from morphogen.rl.normalizers import ObservationNormalizer
from morphogen.rl.policy import ActorCritic, PolicyConfig
from morphogen.rl.ppo import PPO
from morphogen.telemetry.events import to_json
from morphogen.version import __version__

FORMAT = "morphogen-policy-1"
FILE_NAME = "policy.safetensors"
"""What the file is called in a run directory."""
_KEY, _NETWORK, _NORMALIZER, _OBSERVATIONS = "morphogen", "network.", "normalizer.", "sample_observations"
_MAX_NAMED = 4
_TOLERANCE = 1e-4


def save_policy(agent: PPO, env: GrowthVectorEnv, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write what acting needs of ``agent``, whole or not at all.

    Args:
        agent: Trained in ``env``, or in a wrapper of it.
        env: The environment; says what the numbers mean.
        path: File to write, ending in ``.safetensors``.
        facts: Plain data to keep beside it, for example the command and the steps.

    Raises:
        MorphogenError: The disk refused; what was there before is whole.
    """
    given = agent.get_parameters()
    normalizer = given["parts"].get("observation_normalizer")
    tensors: dict[str, Tensor] = {f"{_NETWORK}{name}": tensor for name, tensor in given["policy"].items()}
    if normalizer is not None:
        tensors |= {f"{_NORMALIZER}{name}": torch.as_tensor(np.asarray(value)) for name, value in normalizer.items()}
    tensors[_OBSERVATIONS] = torch.from_numpy(sample_observations(env.menu.layout))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    network, config = agent.policy, agent.config
    header = {
        "format": FORMAT,
        "choices": choices_table(),
        "features": list(feature_names(env.menu.layout)),
        "policy": config.policy.model_dump(mode="json"),
        "action": config.action.model_dump(mode="json"),
        "num_critics": len(network.critics),
        "num_critic_outputs": cast("nn.Linear", network.critics[0]).out_features,
        "task": env.task.name,
        "slots": list(env.menu.slots),
        "blueprints": [sowing.blueprint for sowing in env.menu.blueprints],
        "env": env.config.model_dump(mode="json"),
        "gamma": config.gamma,
        "version": __version__,
        "facts": to_json(dict(facts or {})),
        "digest": _digest(tensors),
    }
    write_bytes(path, safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)}))


def load_policy(path: Path) -> LearnedPolicy:
    """Return the policy in the file at ``path``, or in the run directory there.

    Raises:
        CheckpointError: There is none, it is damaged, or it was made for other choices, features or another format; the
            message says what to do.
    """
    file = path / FILE_NAME if path.is_dir() else path
    header, tensors = _read(file)
    _check(file, header)
    try:
        return _built(file, header, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}: does not fit this version of morphogen: it was written by {header.get('version')}: {reason} "
            "Train it anew, or use that version."
        ) from error


def find(name: str, *, also: Sequence[str] = ()) -> Path:
    """Return the file of a policy.

    Args:
        name: A run directory, a file, or the name of one that comes with morphogen.
        also: Further names that would do where this is asked; they are in the message.

    Raises:
        CheckpointError: A run directory without a policy.
        ValueError: There is nothing of this name; the nearest is suggested.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise CheckpointError(
                f"{path}: holds no {FILE_NAME}. Train one with `morphogen train`, or go on with `morphogen resume {path}`."
            )
        return path / FILE_NAME
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    offered = [*also, *known]
    near = difflib.get_close_matches(name, offered, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    choice = f" or one of {', '.join(offered)}" if offered else ""
    raise ValueError(f"`policy` must be a run directory or a policy file{choice}, got {name!r}.{hint}")


def shipped() -> dict[str, Path]:
    """Return the policies that come with morphogen: name -> file."""
    folder = resources.files("morphogen") / "policies"
    if not folder.is_dir():
        return {}
    files = (Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".safetensors"))
    return {file.stem: file for file in sorted(files)}


def choices_table() -> dict[str, Any]:
    """Return what the choices of each head mean, beside slots and blueprints, as plain data."""
    table = {
        "op": [op.name for op in Op],
        "style": STYLES,
        "tempo": TEMPOS_TICKS,
        "alpha_target": ALPHA_TARGETS,
        "alpha_speed": ALPHA_SPEEDS_TICKS,
        "alpha_curve": ALPHA_CURVES,
    }
    return json.loads(json.dumps(table))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors, once they are known to be those that were written."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:  # pyright: ignore[reportUnknownMemberType]
            metadata = opened.metadata() or {}
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header: Any = json.loads(metadata.get(_KEY, "null"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}. Check the path.") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged: {error}. Restore it, or train the policy anew.") from error
    if not isinstance(header, dict) or "format" not in header:
        raise CheckpointError(f"{file}: must be a policy that `morphogen train` wrote, and is another file. Check the path.")
    found = cast("dict[str, Any]", header)
    if found["format"] == FORMAT and found.get("digest") != _digest(tensors):
        raise CheckpointError(f"{file}: is damaged: its numbers are not those written. Restore it, or train the policy anew.")
    return found, tensors


def _check(file: Path, header: Mapping[str, Any]) -> None:
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: must be of the format {FORMAT}, got {header['format']}. Use the version of morphogen that wrote it: "
            f"{header.get('version')}."
        )
    for head, meaning in choices_table().items():
        written = header["choices"].get(head)
        if written != meaning:
            raise CheckpointError(
                f"{file}: was trained with the choices {written} of `{head}`, and here they are {meaning}. Train it anew, or "
                f"use the version of morphogen that wrote it: {header.get('version')}."
            )


def _check_features(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse a policy that was trained to see something else: by the names of the numbers, and by what they are."""
    written, here = header["features"], feature_names(layout)
    changed = [name for name in here if name not in written] + [name for name in written if name not in here]
    if not changed and list(here) == written:
        gap_D = np.abs(tensors[_OBSERVATIONS].numpy() - sample_observations(layout)).max(0)
        changed = [here[place] for place in np.flatnonzero(gap_D > _TOLERANCE)]
    elif not changed:
        changed = ["their order"]
    if changed:
        more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
        raise CheckpointError(
            f"{file}: learned from other features: {', '.join(changed[:_MAX_NAMED])}{more} changed since. Train it anew, or "
            f"use the version of morphogen that wrote it: {header.get('version')}."
        )


def _built(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LearnedPolicy:
    env = GrowthEnvConfig(**header["env"])
    _check_features(file, header, tensors, env.layout)
    network = ActorCritic(
        PolicyConfig(**header["policy"]),
        observation_width=len(header["features"]),
        image_shape=None,
        distribution=make(env.layout.action_space, ActionConfig(**header["action"])),
        num_critics=header["num_critics"],
        num_critic_outputs=header["num_critic_outputs"],
        generator=torch.Generator().manual_seed(0),  # every weight is replaced
    )
    network.load_state_dict(_below(_NETWORK, tensors))
    origin = Origin(
        task=header["task"],
        slots=tuple(header["slots"]),
        blueprints=tuple(header["blueprints"]),
        env=env,
        gamma=header["gamma"],
        version=header["version"],
        facts=header["facts"],
    )
    return LearnedPolicy(network, _normalizer(len(header["features"]), _below(_NORMALIZER, tensors)), origin)


def _normalizer(width: int, state: Mapping[str, Tensor]) -> ObservationNormalizer | None:
    if not state:
        return None
    normalizer = ObservationNormalizer(width)
    normalizer.load_state_dict({name: value.numpy() for name, value in state.items()})
    return normalizer


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and numbers: safetensors itself would not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
