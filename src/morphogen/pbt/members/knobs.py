"""Where hyperparameters take effect: something to read the value in force from, and to write another one to."""

from __future__ import annotations

from morphogen.pbt.spaces import Value
from morphogen.state import TrainingState
from morphogen.state.surgery_options import base_rate, option, set_option


class LearningRate:
    """The learning rate of an optimizer before its schedule: that of the first group; others keep their ratio to it.

    Args:
        state: The run.
        optimizer: Name of the optimizer; "" for the only one.
    """

    def __init__(self, state: TrainingState, optimizer: str = "") -> None:
        """Change nothing."""
        self._state, self._optimizer = state, optimizer

    def read(self) -> Value:
        """Return the rate."""
        return base_rate(self._state.optimizers[self._optimizer])

    def write(self, value: Value) -> None:
        """Set it; schedules go on from where they are, scaled."""
        self._state.set_base_rate(float(value), self._optimizer)


class Option:
    """A number among the options of an optimizer: ``weight_decay``, ``momentum``, ``eps``.

    It is set in every group in which it is what it is in the first one.

    Args:
        state: The run.
        name: Of the option.
        optimizer: Name of the optimizer; "" for the only one.
    """

    def __init__(self, state: TrainingState, name: str, optimizer: str = "") -> None:
        """Check that there is such an option; ValueError if not."""
        self._state, self._name, self._optimizer = state, name, optimizer
        self.read()

    def read(self) -> Value:
        """Return the number."""
        return option(self._state.optimizers[self._optimizer], self._name)

    def write(self, value: Value) -> None:
        """Set it."""
        set_option(self._state.optimizers[self._optimizer], self._name, float(value))


class Attribute:
    """An attribute of any object: ``p`` of a dropout layer, a coefficient of a loss.

    Args:
        holder: The object that uses it.
        name: Of the attribute.
    """

    def __init__(self, holder: object, name: str) -> None:
        """Check that it is there; AttributeError if not."""
        self._holder, self._name = holder, name
        getattr(holder, name)

    def read(self) -> Value:
        """Return the value."""
        return getattr(self._holder, self._name)

    def write(self, value: Value) -> None:
        """Set it."""
        setattr(self._holder, self._name, value)
