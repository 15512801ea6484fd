"""Random streams: one root seed, and an independent named stream for every use of chance.

A stream depends on the root seed and its name alone: not on what else was drawn, nor in which order streams were asked
for. Germinating a seed or turning a sink on therefore cannot shift any other stream. Nothing here seeds, draws from or
replaces a global generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import struct
from collections.abc import Generator
from typing import Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class RandomStreams:
    """The root of all chance in a run.

    Attributes:
        root_seed: Any integer >= 0.
        path: Names of the parents; filled by :meth:`child`.

    Example:
        >>> streams = RandomStreams(7)
        >>> first = streams.integer("data", 0)
        >>> _ = streams.numpy("something else").integers(100)
        >>> first == streams.integer("data", 0)
        True
    """

    root_seed: int
    path: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        """Check the root seed."""
        if isinstance(self.root_seed, bool) or not isinstance(self.root_seed, int) or self.root_seed < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"`root_seed` must be an integer >= 0, got {self.root_seed!r}. Pass for example 0.")

    def child(self, *name: str | int) -> RandomStreams:
        """Return the streams below ``name``: ``streams.child("a").numpy("b")`` is ``streams.numpy("a", "b")``."""
        return RandomStreams(self.root_seed, (*self.path, *name))

    def sequence(self, *name: str | int) -> np.random.SeedSequence:
        """Return the ``SeedSequence`` called ``name``: the root's entropy, with the hash of the name as spawn key."""
        text = json.dumps([*self.path, *name])
        words = struct.unpack("<8I", hashlib.sha256(text.encode()).digest())
        return np.random.SeedSequence(self.root_seed, spawn_key=words)

    def numpy(self, *name: str | int) -> np.random.Generator:
        """Return a NumPy generator at the start of the stream called ``name``."""
        return np.random.Generator(np.random.PCG64(self.sequence(*name)))

    def torch(self, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a torch generator on ``device`` at the start of the stream called ``name``."""
        return torch.Generator(device).manual_seed(self.integer(*name))

    def integer(self, *name: str | int) -> int:
        """Return the seed of the stream called ``name`` as an integer in [0, 2**63)."""
        low, high = self.sequence(*name).generate_state(2, np.uint32)
        return (int(high) << 32 | int(low)) >> 1


@contextlib.contextmanager
def draw_from(generator: torch.Generator) -> Generator[None]:
    """Within the block, every random torch operation of this thread draws from ``generator``, none from a global one.

    ``torch.nn`` modules initialise themselves from the global generator and take no other; building them in this block
    gives them a stream of their own. Operations on another device use a generator seeded from ``generator``.

    Raises:
        RuntimeError: An operation in the block is random and cannot take a generator (for example fused dropout).

    Example:
        >>> with draw_from(torch.Generator().manual_seed(1)):
        ...     layer = torch.nn.Linear(4, 4)
    """
    with _DrawFrom(generator):
        yield


class _DrawFrom(TorchDispatchMode):
    """Gives each random operation below it a generator; see :func:`draw_from`."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generators = {generator.device.type: generator}
        self._root = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given = any(isinstance(value, torch.Generator) for value in (*args, kwargs.get("generator")))
        if given or _without_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        overload = _with_generator(func)
        if overload is None:
            raise RuntimeError(
                f"{func} is random and takes no generator, so it would draw from the global stream. "
                "Switch it off here (eval mode), or initialise with torch.nn.init functions."
            )
        kwargs["generator"] = self._on(_device_of(args, kwargs))
        return overload(*args, **kwargs)

    def _on(self, device: torch.device) -> torch.Generator:
        if device.type not in self._generators:
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._root))
            self._generators[device.type] = torch.Generator(device).manual_seed(seed)
        return self._generators[device.type]


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a call of fused attention that draws nothing, since its probability of dropout is zero."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
            return given == 0.0
    return False


def _with_generator(func: Any) -> Any:
    """Return the overload of ``func`` that also takes a generator (itself if it does), or None."""
    wanted = [argument.name for argument in func._schema.arguments if argument.name != "generator"]
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in overload._schema.arguments]
        if "generator" in names and [name for name in names if name != "generator"] == wanted:
            return overload
    return None


def _device_of(args: tuple[object, ...], kwargs: dict[str, object]) -> torch.device:
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device
    return torch.device(cast("torch.device | str | None", kwargs.get("device")) or torch.get_default_device())
