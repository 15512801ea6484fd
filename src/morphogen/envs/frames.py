"""What is measured of N runs at one moment, as plain numbers; NaN is "not known".

Legend: N environments, G numbers of a run, S places for slots, R numbers of a slot. Whoever trains writes rows; masks,
observations and rewards are computed from whole arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NUM_LAGS = 5
LAGS = tuple(f"metric_{lag}" for lag in range(1, NUM_LAGS + 1))
RUN_NUMBERS = (
    "episode",  # number of the episode, from 0
    "tick",  # decisions so far
    "total_ticks",  # decisions of an episode
    "loss",  # mean of the training loss over the last tick
    "metric",  # on the decision split
    "metric_error",  # its standard error
    *LAGS,  # the metric so many ticks ago
    "start_metric",  # before any training
    "best_metric",  # so far
    "all_off_metric",  # with every acting seed at alpha 0; the metric itself without any
    "host_parameters",
    "parameters",  # host and every seed
    "relative_flops",  # of training so far, over those of the host alone
    "skipped",  # optimizer steps the governor stopped in the last tick
    "quarantined",  # seeds the governor took out in the last tick
    "rolled_back",  # 1.0 if the governor rewound the run in the last tick, which ends the episode
    "last_op",  # what was done before the last tick
    "last_slot",  # and where; -1 for nowhere
    "test_metric",  # where the episode is over and the test split was asked for
)
SLOT_NUMBERS = (
    "stage",  # NaN: there is no such slot
    "ticks_in_stage",
    "age_ticks",
    "alpha",
    "alpha_target",
    "ramp_ticks_left",  # 0 at rest
    "is_pruning",
    "gate_open",  # of ADVANCE or FOSSILIZE
    "refusals",  # what the gate lacks, as a sum of 2 ** place in ``Check``
    "contribution",  # to the metric, as last measured; NaN before
    "contribution_error",
    "contribution_tick",  # when
    "contribution_peak",  # the highest so far of this seed
    "gradient_ratio",  # per element, over the host's; NaN if not fresh
    "finite",  # whether weights and gradients were
    "parameters",
    "blueprint",  # place in the menu; NaN without a seed
    "operator",  # place in ``OPERATORS``; NaN without a seed
    "blend_ticks",  # length of its first ramp
    "curve",  # place in ``CURVES``: shape of its first ramp and of its fading
    "metric_at_birth",  # when the seed was germinated
    "germinations",  # seeds the slot has had
    "tried",  # blueprints pruned here, as a sum of 2 ** place in the menu
)
_RUN_COLUMN = {name: place for place, name in enumerate(RUN_NUMBERS)}
_SLOT_COLUMN = {name: place for place, name in enumerate(SLOT_NUMBERS)}

FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Frames:
    """The numbers of N runs. The arrays may be shared memory: :meth:`copy` what is to stay.

    Attributes:
        runs_NG: In the order of ``RUN_NUMBERS``.
        slots_NSR: In the order of ``SLOT_NUMBERS``.
    """

    runs_NG: FloatArray
    slots_NSR: FloatArray

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> Frames:
        """Return frames in which nothing is known."""
        return cls(np.full((num_envs, len(RUN_NUMBERS)), np.nan), np.full((num_envs, num_slots, len(SLOT_NUMBERS)), np.nan))

    @property
    def num_envs(self) -> int:
        """N."""
        return len(self.runs_NG)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slots_NSR.shape[1]

    def run(self, name: str) -> FloatArray:
        """Return a number of every run, [N]; a view."""
        return self.runs_NG[:, _RUN_COLUMN[name]]

    def slot(self, name: str) -> FloatArray:
        """Return a number of every slot, [N, S]; a view."""
        return self.slots_NSR[:, :, _SLOT_COLUMN[name]]

    def in_stage(self, stages: Sequence[int]) -> NDArray[np.bool_]:
        """Return which slots are in one of ``stages``, [N, S]."""
        return np.isin(self.slot("stage"), stages)

    def copy(self) -> Frames:
        """Return frames that alias nothing."""
        return Frames(self.runs_NG.copy(), self.slots_NSR.copy())

    def rows(self, rows: Sequence[int] | NDArray[np.int64] | slice) -> Frames:
        """Return some of the rows; views where ``rows`` is a slice."""
        return Frames(self.runs_NG[rows], self.slots_NSR[rows])

    def write_run(self, row: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one run; those that are not given are not known."""
        self.runs_NG[row] = _in_order(numbers, _RUN_COLUMN)

    def write_slot(self, row: int, place: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one slot; those that are not given are not known."""
        self.slots_NSR[row, place] = _in_order(numbers, _SLOT_COLUMN)

    def put(self, row: int, source: Frames, source_row: int = 0) -> None:
        """Write one row of ``source`` into ``row``."""
        self.runs_NG[row] = source.runs_NG[source_row]
        self.slots_NSR[row] = source.slots_NSR[source_row]


def _in_order(numbers: Mapping[str, float], columns: Mapping[str, int]) -> list[float]:
    unknown = numbers.keys() - columns.keys()
    if unknown:
        raise KeyError(f"frames have no number called {', '.join(sorted(unknown))}")
    return [numbers.get(name, math.nan) for name in columns]
