"""How a vector environment begins the next episode, and which of its layers can be trusted with it.

Shape letters: N environments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from morphogen.rl.spaces import BoolArray
from morphogen.state.extras import is_stateful

AnyVectorEnv: TypeAlias = VectorEnv[Any, Any, Any]
Handling: TypeAlias = Literal["same step", "masked reset", "filler rows"]

_MASK = "reset_mask"


def autoreset_mode_of(env: AnyVectorEnv) -> AutoresetMode:
    """Return the mode that the environment declares in ``metadata["autoreset_mode"]``, as the enum.

    Raises:
        TypeError: ``env`` is no vector environment.
        ValueError: It declares none, or none that is known.

    Example:
        >>> import gymnasium
        >>> autoreset_mode_of(gymnasium.make_vec("CartPole-v1", vectorization_mode="sync"))
        <AutoresetMode.NEXT_STEP: 'NextStep'>
    """
    if not isinstance(env, VectorEnv):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"`env` must be a gymnasium.vector.VectorEnv, got {type(env).__name__}. Use make_vector or SyncVectorEnv."
        )
    declared = (env.metadata or {}).get("autoreset_mode")
    for mode in AutoresetMode:
        if declared in (mode, mode.value):
            return mode
    known = ", ".join(f"AutoresetMode.{mode.name}" for mode in AutoresetMode)
    raise ValueError(
        f'`metadata["autoreset_mode"]` of {type(env.unwrapped).__name__} must be one of {known}, got {declared!r}. '
        "Set it to what the environment does with an episode that has ended."
    )


def handling_of(env: AnyVectorEnv) -> Handling:
    """Return what to do with ended episodes of ``env``; errors as of :func:`autoreset_mode_of`.

    Gymnasium's own ``SyncVectorEnv`` and ``AsyncVectorEnv`` honour a masked reset in every mode, so that NEXT_STEP need not
    waste a step with them. Wrappers other than ``RecordEpisodeStatistics`` would lose count of their episodes by it, or
    refuse, and workers of ``AsyncVectorEnv`` without shared memory (Gymnasium 1.4) reset twice.
    """
    mode = autoreset_mode_of(env)
    if mode is AutoresetMode.SAME_STEP:
        return "same step"
    if mode is AutoresetMode.DISABLED or (_is_own(env.unwrapped) and not _opaque(env)):
        return "masked reset"
    return "filler rows"


def reset_options_for(env: AnyVectorEnv) -> Callable[[BoolArray], dict[str, Any]]:
    """Return the function that makes the options of a masked reset from the mask [N]."""
    return _LastingMask if _is_own(env.unwrapped) and not _opaque(env) else lambda mask_N: {_MASK: mask_N}


def state_holder(env: AnyVectorEnv) -> tuple[Any, str]:
    """Return the layer of ``env`` that saves and loads the state of all, or None and why there is none.

    A layer is asked only if no layer around it has a state that it would not know of. An empty reason means that the
    episodes can be replayed: ``env`` is a ``SyncVectorEnv`` under nothing that remembers.
    """
    for layer in _layers(env):
        if is_stateful(layer):
            return layer, ""
        if isinstance(layer, VectorWrapper) and type(layer) is not RecordEpisodeStatistics:
            return None, f"the wrapper {type(layer).__name__} saves no state"
    base = env.unwrapped
    return None, "" if type(base) is SyncVectorEnv else f"{type(base).__name__} saves no state and cannot be replayed"


def statistics_of(env: AnyVectorEnv) -> list[RecordEpisodeStatistics[Any, Any]]:
    """Return the layers of ``env`` that sum up episodes."""
    return [layer for layer in _layers(env) if isinstance(layer, RecordEpisodeStatistics)]


def _layers(env: AnyVectorEnv) -> Iterator[AnyVectorEnv]:
    """The wrappers from the outermost on, then what they wrap."""
    while isinstance(env, VectorWrapper):
        yield env
        env = env.env
    yield env


def _opaque(env: AnyVectorEnv) -> bool:
    return any(isinstance(layer, VectorWrapper) and type(layer) is not RecordEpisodeStatistics for layer in _layers(env))


def _is_own(base: AnyVectorEnv) -> bool:
    if type(base) is AsyncVectorEnv:
        return bool(base.shared_memory) and base.worker is None
    return type(base) is SyncVectorEnv


class _LastingMask(dict[str, Any]):
    """Options that hold the mask for every layer, also after one took it out, and nothing for the sub-environments.

    ``SyncVectorEnv`` pops the mask from the options; ``RecordEpisodeStatistics`` around it looks for it afterwards and,
    without it, forgets the running sums of all environments (Gymnasium 1.4).
    """

    def __init__(self, mask_N: BoolArray) -> None:
        super().__init__()
        self._mask_N = mask_N

    def __contains__(self, key: object) -> bool:
        return key == _MASK or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key == _MASK:
            return self._mask_N
        raise KeyError(key)

    def pop(self, key: str, *default: Any) -> Any:
        return self._mask_N if key == _MASK else super().pop(key, *default)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[()]]:
        return dict, ()  # what goes to another process is for a sub-environment
