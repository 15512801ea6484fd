"""A plain function that trains in a loop and reports, as a member."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from morphogen.errors import MorphogenError
from morphogen.pbt.member import Trained, trained_of
from morphogen.pbt.spaces import Value

Report = Callable[..., None]
"""``report(score, state=None)``: end one step; ``score`` is a number or a mapping, ``state`` what to go on from."""
TrainFunction = Callable[[Mapping[str, Value], Any, Report], object]
"""``function(hyperparameters, state, report)``: train, from ``state`` if it is not None, and report again and again."""


class FunctionMember:
    """A plain function as a member of a population; each report is one step.

    The function runs in a thread of its own, one step at a time: within ``report`` it waits until it is to go on. When other
    hyperparameters or another state come, ``report`` does not return any more, and the function is called anew with them.

    Args:
        function: Called as ``function(hyperparameters, state, report)``.
        metric: Name of the score in mappings that it reports.

    Example:
        >>> def climb(hyperparameters, state, report):
        ...     height = state or 0.0
        ...     while True:
        ...         height += hyperparameters["step"]
        ...         report(height, state=height)
        >>> member = FunctionMember(climb)
        >>> _ = member.apply_hyperparameters({"step": 0.5})
        >>> member.train(until=3).score
        1.5
        >>> member.close()
    """

    def __init__(self, function: TrainFunction, *, metric: str = "score") -> None:
        """Call nothing yet."""
        self._function, self._metric = function, metric
        self._hyperparameters: dict[str, Value] = {}
        self._state: Any = None
        self._num_steps = 0
        self._last: Trained | None = None
        self._call: _Call | None = None

    def train(self, until: int) -> Trained:
        """Let the function report up to ``until`` times.

        Raises:
            MorphogenError: It returned before it reported once. Besides, whatever it raises.
        """
        while self._num_steps < until:
            if self._call is None:
                self._call = _Call(self._function, dict(self._hyperparameters), copy.deepcopy(self._state))
            reported = self._call.go_on()
            if reported is None:
                break
            score, self._state = reported
            self._last = trained_of(score, self._metric)
            self._num_steps += 1
        if self._last is None:
            raise MorphogenError("the function returned without a report. Call `report(score)` at the end of each step.")
        return self._last

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return the state that was reported last, and how often the function reported."""
        return {"state": copy.deepcopy(self._state), "num_steps": self._num_steps}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Go on from another state; the function is called anew."""
        self._end()
        self._state, self._num_steps = copy.deepcopy(values["state"]), int(values["num_steps"])

    def apply_hyperparameters(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Use other values from now on; the function is called anew."""
        self._end()
        self._hyperparameters |= values
        return {name: self._hyperparameters[name] for name in values}

    def state_dict(self) -> dict[str, Any]:
        """Return state, steps and hyperparameters."""
        last = None if self._last is None else [self._last.score, list(self._last.scores), dict(self._last.metrics)]
        return {**self.get_parameters(), "hyperparameters": dict(self._hyperparameters), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.set_parameters(state)
        self._hyperparameters = dict(state["hyperparameters"])
        last = state["last"]
        self._last = None if last is None else Trained(last[0], tuple(last[1]), last[2])

    def close(self) -> None:
        """End the function."""
        self._end()

    def _end(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.end()


class _Ended(BaseException):
    """Raised in ``report`` to leave a function whose values are out of date."""


class _Call:
    """One call of the function, in a thread that runs only while :meth:`go_on` waits."""

    def __init__(self, function: TrainFunction, hyperparameters: dict[str, Value], state: Any) -> None:
        self._may_run, self._has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self._is_ended, self._is_over, self._num_threads = False, False, torch.get_num_threads()
        self._reported: tuple[Any, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, hyperparameters, state), daemon=True)
        self._thread.start()

    def go_on(self) -> tuple[Any, Any] | None:
        """Run up to the next report, and return it; None if the function returned. Raises what it raises."""
        self._reported = None
        if not self._is_over:
            self._may_run.release()
            self._has_paused.acquire()
        if self._error is not None:
            raise self._error
        return self._reported

    def end(self) -> None:
        """Leave the function."""
        self._is_ended = True
        self._may_run.release()
        self._thread.join()

    def _report(self, score: Any, state: Any = None) -> None:
        self._reported = score, copy.deepcopy(state)
        self._pause()

    def _pause(self) -> None:
        self._has_paused.release()
        self._may_run.acquire()
        if self._is_ended:
            raise _Ended

    def _run(self, function: TrainFunction, hyperparameters: dict[str, Value], state: Any) -> None:
        torch.set_num_threads(self._num_threads)  # of this thread alone
        self._may_run.acquire()
        try:
            if not self._is_ended:
                function(hyperparameters, state, self._report)
        except _Ended:
            return
        except BaseException as error:  # border: it belongs to whoever waits for the report, `sys.exit()` as well
            self._error = error
        self._is_over = True
        self._has_paused.release()
