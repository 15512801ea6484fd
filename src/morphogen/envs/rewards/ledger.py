"""What rewards remember of an episode beyond the frames.

Legend: N environments, S places for slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from morphogen.envs.frames import FloatArray


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What rewards remember; all points, 0 where there is nothing. No array is ever written to.

    Attributes:
        credit_NS: "escrow": credit paid for a seed so far, which goes back unless the seed is fossilised.
        pool_NS: "basic_plus": what is still to be earned by a fossil.
        rate_NS: "basic_plus": what it can earn in a tick.
        basis_NS: "basic_plus": contribution, in units of the metric, at which it earns all of that.
        advance_N: "loss": what was paid ahead for a falling loss, with interest; it goes back at the end.
    """

    credit_NS: FloatArray
    pool_NS: FloatArray
    rate_NS: FloatArray
    basis_NS: FloatArray
    advance_N: FloatArray

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> Self:
        """Return a ledger of N environments without an entry.

        Example:
            >>> Ledger.empty(num_envs=2, num_slots=3).credit_NS.shape
            (2, 3)
        """
        return cls(*(np.zeros((num_envs, num_slots)) for _ in range(4)), advance_N=np.zeros(num_envs))

    def without(self, rows_N: NDArray[np.bool_]) -> Self:
        """Return the ledger with the rows that are True empty."""
        kept = {
            name: np.where(rows_N if array.ndim == 1 else rows_N[:, None], 0.0, array) for name, array in self.arrays().items()
        }
        return dataclasses.replace(self, **kept)

    def arrays(self) -> dict[str, FloatArray]:
        """Return every array by its name; no copies."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, FloatArray], num_envs: int, num_slots: int) -> Self:
        """Return the ledger of :meth:`arrays`, copied.

        Raises:
            ValueError: There are others than those of a ledger of N environments with S places, or not all.
        """
        shapes = {name: array.shape for name, array in cls.empty(num_envs, num_slots).arrays().items()}
        found = {name: np.shape(array) for name, array in arrays.items()}
        if found != shapes:
            raise ValueError(f"`state` must hold arrays of shapes {shapes}, got {found}. It is of other environments.")
        return cls(**{name: np.array(array, dtype=np.float64) for name, array in arrays.items()})
