"""Parameters as data: what one agent gives another, and how it is taken over, all or nothing.

Format ``v2_full_parameters``::

    {"format": "v2_full_parameters",
     "policy": {name: tensor},
     "parts": {"observation_normalizer": ..., "kl_penalty": ..., "progress": ...},    # state_dicts of those the agent has
     "optimizer": {name: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}}            # only if asked for

Format ``v1_policy_only`` has ``policy`` alone; bare weights are that dict itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from morphogen.errors import StateMismatch
from morphogen.state import Snapshot, TrainingState, surgery, trees
from morphogen.state.checkpoint import FULL, WEIGHTS
from morphogen.state.events import OptimizerReset
from morphogen.state.records import GroupRecord, OptimizerRecord, encode_optimizer
from morphogen.state.snapshot import Tables
from morphogen.telemetry.events import Emit

_KEPT_IF_ABSENT = frozenset({"progress"})


@dataclasses.dataclass(frozen=True)
class ParametersReport:
    """What became of each part of an agent that took over parameters.

    Attributes:
        format: What was given: "v2_full_parameters", "v1_policy_only" or "bare weights".
        loaded: Parts that are now as they were given.
        reset: Parts that were not given and start anew.
        kept: Parts that are as they were.
    """

    format: str
    loaded: tuple[str, ...]
    reset: tuple[str, ...]
    kept: tuple[str, ...]


class Portable:
    """The parts of an agent that travel.

    Args:
        policy: Its weights.
        optimizer: Its moments.
        parts: What else travels, by name; each has ``state_dict`` and ``load_state_dict``. What they hold now is what a
            reset goes back to.
        emit: Receives an ``OptimizerReset`` event when moments were not given.
    """

    def __init__(self, policy: nn.Module, optimizer: Optimizer, parts: Mapping[str, Any], emit: Emit) -> None:
        """Remember how each part starts."""
        self._policy, self._optimizer, self._parts, self._emit = policy, optimizer, dict(parts), emit
        self._fresh = {name: _state_of(part) for name, part in self._parts.items()}
        self.state = TrainingState(policy, optimizer, extras=self._parts)

    def read(self, *, include_optimizer: bool) -> dict[str, Any]:
        """Return everything that travels, as copies."""
        values: dict[str, Any] = {
            "format": FULL,
            "policy": {name: tensor.detach().clone() for name, tensor in self._policy.state_dict().items()},
            "parts": {name: _state_of(part) for name, part in self._parts.items()},
        }
        if include_optimizer:
            values["optimizer"] = copy.deepcopy({name: dict(moments) for name, moments in self._record().state.items()})
        return values

    def write(self, values: Mapping[str, Any]) -> ParametersReport:
        """Take over ``values`` in any of the three formats.

        Raises:
            StateMismatch: Something does not fit, or the format is unknown; nothing was changed.
        """
        given, kind = _as_full(values)
        unknown = sorted(given["parts"].keys() - self._parts.keys())
        if unknown:
            raise StateMismatch(
                "the parameters do not fit this agent; nothing was changed.",
                tuple(f"{name!r} has no place here" for name in unknown),
            )
        present = self._parts.keys() & given["parts"].keys()
        kept = (_KEPT_IF_ABSENT & self._parts.keys()) - present
        states = {
            name: given["parts"].get(name, _state_of(part) if name in kept else self._fresh[name])
            for name, part in self._parts.items()
        }
        moments = given.get("optimizer")
        self.state.adopt(self._snapshot(given["policy"], states, moments), "reset" if moments is None else "copy")
        loaded = {"policy", *present, *(() if moments is None else ("optimizer",))}
        reset = self._parts.keys() - present - kept
        if moments is None:
            reset = reset | {"optimizer"}
            self._emit(OptimizerReset(path="set_parameters", reason=f"{kind} came without moments"))
        return ParametersReport(kind, tuple(sorted(loaded)), tuple(sorted(reset)), tuple(sorted(kept)))

    def _record(self) -> OptimizerRecord:
        return surgery.read(self._optimizer, {id(parameter): name for name, parameter in self._policy.named_parameters()})

    def _snapshot(self, policy: Mapping[str, Tensor], states: Mapping[str, Any], moments: Any) -> Snapshot:
        """Return the run as it is now, but with these values, for ``adopt`` to check and take over."""
        now, loose = self.state.capture(), dict[str, Tensor]()
        meta: dict[str, Any] = dict(now.meta)
        meta["extras"] = {name: trees.encode(state, loose, f"extras.{name}") for name, state in states.items()}
        saved = self._policy.state_dict()
        constants = {name: tensor for name, tensor in now.table("model").items() if name not in saved}
        tables: Tables = {"model": {**constants, **policy}, "tensors": {}}
        meta.pop("optimizer", None)
        if moments is not None:
            record = self._record()
            groups = tuple(GroupRecord(group.names, group.options) for group in record.groups)
            data, tensors = encode_optimizer(OptimizerRecord(record.kind, groups, moments), loose, "optimizer")
            meta["optimizer"], tables["optimizer"] = {"": data}, tensors
        return Snapshot(tables, loose, meta)


def _as_full(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return ``values`` with policy and parts, and the name of the format they came in."""
    kind = values.get("format")
    if kind == FULL:
        _check_keys(values, {"format", "policy", "parts"}, {"optimizer"})
        return dict(values), FULL
    if kind == WEIGHTS:
        _check_keys(values, {"format", "policy"}, set())
        return {"policy": values["policy"], "parts": {}}, WEIGHTS
    if kind is None and values and all(isinstance(value, Tensor) for value in values.values()):
        return {"policy": values, "parts": {}}, "bare weights"
    raise StateMismatch(
        f"`format` must be {FULL!r}, {WEIGHTS!r} or absent around bare weights, got {kind!r}. Nothing was changed."
    )


def _check_keys(values: Mapping[str, Any], required: set[str], optional: set[str]) -> None:
    problems = [f"{name!r} is missing" for name in sorted(required - values.keys())]
    problems += [f"{name!r} is unknown" for name in sorted(values.keys() - required - optional)]
    if problems:
        raise StateMismatch("the parameters are not whole; nothing was changed.", tuple(problems))


def _state_of(part: Any) -> Any:
    """Return a copy of a part's state, without what belongs to episodes under way."""
    return copy.deepcopy(part.portable_state_dict() if hasattr(part, "portable_state_dict") else part.state_dict())
