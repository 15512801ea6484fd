"""Any training run as a member: a :class:`~morphogen.state.TrainingState`, a function that does one step, one that scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from morphogen.pbt.members.handover import hand_over
from morphogen.pbt.spaces import Value
from morphogen.pbt.strategies import Strategy
from morphogen.state import TrainingState


class Knob(Protocol):
    """A hyperparameter where it takes effect."""

    def read(self) -> Value:
        """Return the value in force."""
        ...

    def write(self, value: Value) -> None:
        """Put another one in force."""
        ...


class StateMember:
    """A training run as a member of a population.

    Takes over weights, buffers, structure (grown seeds), scaler and normalisers of the source, moments by the strategy; its
    streams are derived anew; groups, rates and schedule stay its own, until its hyperparameters are applied.

    Args:
        state: The run.
        step: Does one training step.
        score: Returns what the run is compared by.
        knobs: Hyperparameter -> where it takes effect; see :mod:`morphogen.pbt.members.knobs`.
        streams: "derive": after taking over another run it draws from streams of its own, derived from the source's; "inherit":
            from the very streams of the source, so that it would repeat what the source does next; a control.

    Attributes:
        state: As given.
        num_steps: Steps since the beginning of the lineage.

    Example:
        >>> import torch
        >>> from morphogen.pbt.members.knobs import LearningRate
        >>> model = torch.nn.Linear(1, 1)
        >>> state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> member = StateMember(state, step=lambda: None, score=lambda: 0.0, knobs={"lr": LearningRate(state)})
        >>> member.apply_hyperparameters({"lr": 0.2})
        {'lr': 0.2}
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        step: Callable[[], object],
        score: Callable[[], Any],
        knobs: Mapping[str, Knob],
        streams: str = "derive",
    ) -> None:
        """Have trained nothing."""
        if streams not in ("derive", "inherit"):
            raise ValueError(f"`streams` must be derive or inherit, got {streams!r}. Choose one of these words.")
        self.state, self.num_steps = state, 0
        self._step, self._score, self._knobs, self._streams = step, score, dict(knobs), streams

    def train(self, until: int) -> Any:
        """Do steps up to ``until``, and return the score."""
        while self.num_steps < until:
            self._step()
            self.num_steps += 1
        return self._score()

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return a snapshot of the run, and how far it came."""
        return {"snapshot": self.state.capture(reuse=False), "num_steps": self.num_steps}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Take over another run; moments start anew, and streams stay."""
        self.state.adopt(values["snapshot"], "reset")
        self.num_steps = values["num_steps"]

    def adopt(self, values: Mapping[str, Any], optimizer: Strategy, seed: int) -> None:
        """Take over another run, moments by the strategy.

        Raises:
            StateMismatch: The two runs do not fit; this one is as it was.
        """
        hand_over(self.state, values["snapshot"], optimizer, None if self._streams == "inherit" else seed)
        self.num_steps = values["num_steps"]

    def apply_hyperparameters(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Use ``values`` from now on; returns what is in force."""
        unknown = [name for name in values if name not in self._knobs]
        if unknown:
            raise ValueError(f"`{unknown[0]}` must be one of {', '.join(self._knobs)}. Give the member a knob for it.")
        for name, value in values.items():
            self._knobs[name].write(value)
        return {name: self._knobs[name].read() for name in values}

    def hyperparameters(self) -> dict[str, Value]:
        """Return what is in force."""
        return {name: knob.read() for name, knob in self._knobs.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves."""
        return {"snapshot": self.state.capture(reuse=False), "num_steps": self.num_steps, "knobs": self.hyperparameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        for name, value in state["knobs"].items():
            self._knobs[name].write(value)
        self.state.restore(state["snapshot"])
        self.num_steps = state["num_steps"]
