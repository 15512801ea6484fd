"""What one step of N environments was: the whole truth a reward may look at, written after the action was executed."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from morphogen.control import Op
from morphogen.envs.frames import FloatArray, Frames


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of N environments. Nothing in it is changed afterwards.

    Attributes:
        before: What was known when the action was chosen, S places for slots.
        after: What was known after it was executed and the networks were trained; of the episode that was played, even where
            a new one has begun since.
        choices_NH: The actions, H choices each; all of them were executed.
        ended_N: Which episodes are over with this step.
        faulty_N: Which of them the governor ended.
        gamma: The discount of the reward.
    """

    before: Frames
    after: Frames
    choices_NH: NDArray[np.int64]
    ended_N: NDArray[np.bool_]
    faulty_N: NDArray[np.bool_]
    gamma: float

    @property
    def op_N(self) -> NDArray[np.int64]:
        """What was done."""
        return self.choices_NH[:, 0]

    @property
    def slot_N(self) -> NDArray[np.int64]:
        """Where; without meaning for WAIT, which has no slot."""
        return self.choices_NH[:, 1]

    def at_slot(self, numbers_NS: FloatArray) -> FloatArray:
        """Return of a number of every slot that of the slot acted on, [N]; NaN for WAIT."""
        return np.where(self.op_N == Op.WAIT, np.nan, numbers_NS[np.arange(len(self.op_N)), self.slot_N])
