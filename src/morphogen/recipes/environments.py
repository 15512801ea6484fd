"""Environments of a job, tried out before anything is written: what cannot work is said at once, in one sentence."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import RecordVideo

from morphogen.errors import EnvironmentFault, MorphogenError
from morphogen.rl.vector import make_vector

_RENDER_MODE = "rgb_array"
_Env = gym.Env[Any, Any]


def check_environment(env_id: str, kwargs: Mapping[str, Any], *, video: bool) -> None:
    """Make one environment and close it; with ``video``, also reset it and render a frame.

    Raises:
        ValueError: There is no such environment, or it cannot be recorded.
        MorphogenError: A package is missing, or the environment cannot be made.
    """
    if video:
        _check_recorder()
    with contextlib.closing(_make(env_id, kwargs)) as env:
        modes = env.metadata.get("render_modes", [])
    if video and _RENDER_MODE not in modes:
        raise ValueError(
            f"`video` must be left out for {env_id}: it does not render {_RENDER_MODE!r}, but {', '.join(modes) or 'nothing'}."
        )
    if video:
        with contextlib.closing(_make(env_id, {**kwargs, "render_mode": _RENDER_MODE})) as env:
            _check_rendering(env_id, env)


def record_episodes(env_id: str, kwargs: Mapping[str, Any], folder: Path, episodes: int) -> VectorEnv[Any, Any, Any]:
    """Return one environment that writes its first ``episodes`` episodes to ``folder`` as videos; close it to end the last.

    The folder is emptied first.
    """
    shutil.rmtree(folder, ignore_errors=True)

    def record(env: _Env) -> _Env:
        return RecordVideo(env, str(folder), episode_trigger=lambda episode: episode < episodes, name_prefix="evaluation")

    return make_vector(env_id, 1, **{**kwargs, "render_mode": _RENDER_MODE}, wrappers=[record])


def _check_recorder() -> None:
    if importlib.util.find_spec("moviepy") is None:
        raise MorphogenError(
            '`video` needs moviepy, which is not installed. Run `pip install "morphogen[video]"`, or leave it out.'
        )


def _make(env_id: str, kwargs: Mapping[str, Any]) -> _Env:
    try:
        return gym.make(env_id, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise MorphogenError(f"{env_id}: {error}") from error
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"`env` must be a registered Gymnasium environment, got {env_id!r}: {error}") from error
    except Exception as error:  # border: a constructor of an environment may raise anything
        raise EnvironmentFault(f"{env_id}: cannot be made: {type(error).__name__}: {error}") from error


def _check_rendering(env_id: str, env: _Env) -> None:
    try:
        env.reset(seed=0)
        frame = env.render()
    except Exception as error:  # border: rendering may raise anything
        raise EnvironmentFault(f"{env_id}: cannot be rendered: {type(error).__name__}: {error}") from error
    if not isinstance(frame, np.ndarray):
        raise EnvironmentFault(f"{env_id}: must render an array to be recorded, got {type(frame).__name__}. Leave out `video`.")
