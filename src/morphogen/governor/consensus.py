"""One verdict for all processes: the worst of what any of them measured, by one small all-reduce, before it is judged.

The detectors then see the same numbers everywhere, and so every process comes to the same verdict and rewinds to the same
generation without a word more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from morphogen.errors import StateMismatch
from morphogen.state.processes import exchange_device, group_of

LOW_IS_WORSE = frozenset({"output_spread", "prediction_entropy"})
"""Measured numbers of which the lowest of any process is the worst."""
_MISSING, _FINITE, _INFINITE, _NAN = -1.0, 0.0, 1.0, 2.0


@dataclasses.dataclass(frozen=True)
class Consensus:
    """The processes that train one model together; none means this process alone.

    Attributes:
        group: The process group, or None.
    """

    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, distributed: bool | dist.ProcessGroup) -> Consensus:
        """Return the consensus of a process group, or for True of all processes if there are several."""
        return cls(group_of(distributed))

    def worst(
        self, rows: Sequence[Mapping[str, float]], names: Sequence[str], where: Mapping[str, int]
    ) -> list[dict[str, float]]:
        """Return for each number the worst of any process: NaN, else an infinity, else the highest (or lowest) value.

        Args:
            rows: What this process measured, one row for each step since the last check.
            names: Everything that may be measured; a number that one process alone has counts. Others must be in all.
            where: Counts that must be the same in all processes.

        Raises:
            StateMismatch: A count differs.
        """
        if self.group is None:
            return [dict(row) for row in rows]
        others = sorted({name for row in rows for name in row} - set(names))
        columns = (*names, *others)
        packed = [entry for count in where.values() for entry in (float(count), -float(count))]
        for row in rows:
            packed += [entry for name in columns for entry in _packed(name, row.get(name))]
        reduced = torch.tensor(packed, dtype=torch.float64, device=exchange_device(self.group))
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.group)
        entries = iter(reduced.tolist())
        for what in where:
            _refuse_different(what, int(next(entries)), -int(next(entries)))
        found = [{name: _unpacked(name, next(entries), next(entries)) for name in columns} for _ in rows]
        return [{name: value for name, value in row.items() if value is not None} for row in found]

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Return for each flag whether it is set in any process; waits for all of them."""
        local = list(flags)
        if self.group is None or not local:
            return local
        packed = torch.tensor(local, dtype=torch.float32, device=exchange_device(self.group))
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        return [value > 0.0 for value in packed.tolist()]

    def check_same(self, what: str, value: int) -> None:
        """Check that all processes agree on a number.

        Raises:
            StateMismatch: They do not.
        """
        if self.group is None:
            return
        packed = torch.tensor([value, -value], dtype=torch.int64, device=exchange_device(self.group))
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        _refuse_different(what, int(packed[0]), -int(packed[1]))


def _packed(name: str, value: float | None) -> tuple[float, float]:
    """Return (value, kind), of which the maximum over all processes is the worst."""
    if value is None:
        return -math.inf, _MISSING
    if not math.isfinite(value):
        return -math.inf, _NAN if math.isnan(value) else _INFINITE
    return (-value if name in LOW_IS_WORSE else value), _FINITE


def _unpacked(name: str, value: float, kind: float) -> float | None:
    if kind == _MISSING:
        return None
    if kind != _FINITE:
        return math.nan if kind == _NAN else math.inf
    return -value if name in LOW_IS_WORSE else value


def _refuse_different(what: str, highest: int, lowest: int) -> None:
    if highest != lowest:
        raise StateMismatch(
            f"`{what}` must be the same in all processes, got {lowest} to {highest}. Make the governors of all processes at "
            "the same step with the same config, and call `observe` equally often."
        )
