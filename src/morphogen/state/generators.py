"""The generators a run depends on: the global ones of torch, Python and NumPy, read and set back but never drawn from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from morphogen.state.streams import RandomStreams

Stream = torch.Generator | np.random.Generator | random.Random
STREAM_TYPES = (torch.Generator, np.random.Generator, random.Random)


def read_global_generators() -> dict[str, Any]:
    """Return the states of the global generators, one entry for each; about 15 kB, nothing is drawn."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def write_global_generators(state: dict[str, Any]) -> None:
    """Set the global generators to ``state``. Devices that are not here now keep their own."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)


def read_stream(stream: Stream) -> Any:
    """Return the state of one generator as plain data."""
    if isinstance(stream, torch.Generator):
        return stream.get_state()
    if isinstance(stream, np.random.Generator):
        return stream.bit_generator.state
    return stream.getstate()


def reseed_stream(stream: Stream, streams: RandomStreams, name: str) -> None:
    """Put one generator, in place, to the start of the stream called ``name``."""
    if isinstance(stream, torch.Generator):
        stream.manual_seed(streams.integer(name))
    elif isinstance(stream, np.random.Generator):
        kind: Any = type(stream.bit_generator)
        stream.bit_generator.state = kind(streams.sequence(name)).state
    else:
        stream.seed(streams.integer(name))


def write_stream(stream: Stream, state: Any) -> None:
    """Set one generator to ``state``, in place."""
    if isinstance(stream, torch.Generator):
        stream.set_state(state)
    elif isinstance(stream, np.random.Generator):
        stream.bit_generator.state = state
    else:
        stream.setstate(state)
