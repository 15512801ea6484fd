"""Extras: whatever else belongs to a run. One row per kind of object says how it is read and written.

A kind is a *stream* (a generator), a *tensor* (recurrent state), a *module* (an EMA, a normaliser with buffers) or a
*state* (anything with ``state_dict`` and ``load_state_dict``). Streams are rewound with the run but not adopted from
another run: each member of a population keeps its own chance. The same goes for an object that says so itself, by a true
``belongs_to_run`` attribute: an agent's environments, for example.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from morphogen.state.generators import STREAM_TYPES, read_stream, write_stream

ExtraKind = Literal["stream", "tensor", "module", "state"]


def kind_of(name: str, extra: object) -> ExtraKind:
    """Return the kind of ``extra``; TypeError if a run cannot hold it."""
    if isinstance(extra, STREAM_TYPES) or (is_stateful(extra) and getattr(extra, "belongs_to_run", False)):
        return "stream"
    if isinstance(extra, Tensor):
        return "tensor"
    if isinstance(extra, nn.Module):
        return "module"
    if is_stateful(extra):
        return "state"
    raise TypeError(
        f"extra `{name}` must be a module, a tensor, a generator or have `state_dict` and `load_state_dict`, got "
        f"{type(extra).__name__}. Give it those two methods."
    )


def is_stateful(value: object) -> bool:
    """Whether ``value`` has the two methods that save and load its state."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def read_extra(extra: Any) -> Any:
    """Return the plain state of a stream or state extra, possibly aliasing it."""
    return read_stream(extra) if isinstance(extra, STREAM_TYPES) else extra.state_dict()


def write_extra(extra: Any, state: Any) -> None:
    """Give a stream or state extra its state; ``state`` must be the extra's to keep."""
    if isinstance(extra, STREAM_TYPES):
        write_stream(extra, state)
    else:
        extra.load_state_dict(state)
