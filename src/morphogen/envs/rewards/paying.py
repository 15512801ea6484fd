"""The reward of N environments, and what it remembers of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from morphogen.envs.frames import FloatArray
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards.config import RewardConfig, require_same_gamma
from morphogen.envs.rewards.ledger import Ledger
from morphogen.envs.rewards.presets import require_effect, terms_of, total


class Rewards:
    """The reward of one preset for N environments; what it remembers is part of the run.

    Args:
        config: The preset and its constants.
        num_envs: N.
        num_slots: Places for slots.

    Attributes:
        config: As given.
        ledger: What is remembered of each environment's episode; replaced by each :meth:`pay`, never written to.

    Raises:
        ValueError: A setting was changed that the preset does not read.

    Example:
        >>> rewards = Rewards(RewardConfig(preset="sparse"), num_envs=2, num_slots=4)
        >>> [term.name for term in rewards.terms]
        ['terminal', 'final_rent', 'fault']
    """

    def __init__(self, config: RewardConfig, num_envs: int, num_slots: int) -> None:
        """Remember nothing yet."""
        require_effect(config)
        self.config = config
        self.terms = terms_of(config.preset)
        self.ledger = Ledger.empty(num_envs, num_slots)

    def forget(self, rows_N: NDArray[np.bool_]) -> None:
        """Begin anew in the rows that are True: a new episode begins there."""
        self.ledger = self.ledger.without(rows_N)

    def pay(self, record: StepRecord) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Return the reward of each environment, [N], and what each term gave; remembers what it has to.

        Raises:
            ValueError: The record's discount is not that of the config.
        """
        require_same_gamma(self.config, record.gamma)
        ledger, paid = self.ledger, dict[str, FloatArray]()
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, and each term knows what to do with it
            for term in self.terms:
                paid[term.name], ledger = term.pay(record, ledger, self.config)
        self.ledger = ledger
        return total(paid.values()), paid

    def state_dict(self) -> dict[str, FloatArray]:
        """Return what is remembered, copied."""
        return {name: array.copy() for name, array in self.ledger.arrays().items()}

    def load_state_dict(self, state: Mapping[str, FloatArray]) -> None:
        """Remember what :meth:`state_dict` returned.

        Raises:
            ValueError: It is of other environments.
        """
        self.ledger = Ledger.of(state, *self.ledger.credit_NS.shape)
