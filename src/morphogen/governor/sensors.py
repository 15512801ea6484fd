"""Sensors: everything about a step that can be measured before the optimizer's step, kept on the device until it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from morphogen.governor.buffers import BufferCopies
from morphogen.governor.config import SensorConfig
from morphogen.governor.findings import Observation
from morphogen.governor.gradients import gradient_norms, tensor_norms, total_norm
from morphogen.governor.outputs import output_signals
from morphogen.governor.quarantine import isolated_parameters
from morphogen.state import TrainingState, surgery
from morphogen.state.topology import Isolating

# What torch's own optimizers are made of; no public name does the same in one call.
_foreach_sub = torch._foreach_sub  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_STRETCH = 16
Number = Tensor | float
SIGNALS = (
    *("update", "update_per_rate", "buffer_change", "dead_share", "isolated_grad_norm"),
    *("output_spread", "prediction_entropy", "label_entropy", "weight_norm", "probe_loss"),
)
"""Everything that is measured beside loss and gradient norm."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Numbers measured at one step, on the device.

    Attributes:
        names: What was measured.
        values: The numbers, shape (len(names),).
    """

    names: tuple[str, ...]
    values: Tensor

    def observation(self, step: int, metrics: Mapping[str, float] | None = None) -> Observation:
        """Read the numbers; waits for the device."""
        return observation_of(step, dict(zip(self.names, self.values.tolist(), strict=True)) | dict(metrics or {}))


def observation_of(step: int, numbers: Mapping[str, float]) -> Observation:
    """Return the observation that ``numbers`` describe; what is no signal is a metric."""
    signals = {name: value for name, value in numbers.items() if name in SIGNALS}
    metrics = {name: value for name, value in numbers.items() if name not in (*SIGNALS, "loss", "grad_norm")}
    return Observation(step=step, loss=numbers["loss"], grad_norm=numbers.get("grad_norm"), signals=signals, metrics=metrics)


class Sensors:
    """Measures a run. Nothing is read from the device, and nothing of the run is changed.

    What is measured, by name, where the run has it:

    ==================  ================================================================================================
    update              |w - w'| / |w'| over a sample of the trained weights w, w' those at the measurement before
    update_per_rate     the same, divided by the largest learning rate at the measurement before: schedules aside
    buffer_change       the largest |b - b'| / |b'| of any buffer b that a forward pass wrote to
    dead_share          share of trained parameter tensors without a gradient, or with one of exact zeros
    isolated_grad_norm  2-norm of the gradients of parts that do not act on the outputs yet; all else leaves them out
    output_spread       see :func:`morphogen.governor.outputs.output_signals`, with the two below
    prediction_entropy
    label_entropy
    weight_norm         |w| over all trained weights, every ``state_check_every`` steps
    probe_loss          what ``probe`` returns, every ``probe_every`` steps
    ==================  ================================================================================================
    """

    def __init__(
        self,
        state: TrainingState,
        config: SensorConfig | None = None,
        *,
        probe: Callable[[], Number] | None = None,
    ) -> None:
        """Start to measure ``state``; the first update is measured at the second call."""
        self._state = state
        self._probe = probe
        self._config = config or SensorConfig()
        self._sample = WeightSample(self._config.sample_size)
        self.buffers = BufferCopies(state.models.values(), self._config.max_buffer_size)
        self._measured = 0
        self._moved: float | None = None  # since the last measurement, when it was taken before a restart
        self._rate: Number = 0.0  # with which the next update is made
        # Once: asking a class for the methods of a protocol is slow.
        self._isolating = [model for model in state.models.values() if isinstance(model, Isolating)]
        self._sort_parameters()

    def measure(
        self, loss: Number, *, grad_norm: Number | None = None, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> Reading:
        """Return everything that can be measured after ``backward`` and before ``step``.

        ``buffers.put_back()`` then undoes what the forward pass wrote into the buffers, if the step is not taken.

        Raises:
            ValueError: ``loss`` or ``grad_norm`` is not one number, or the outputs have no rows to compare.
        """
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        numbers: dict[str, Number] = {"loss": loss}
        due = self._measured % self._config.state_check_every == 0
        self._measured += 1
        self._sort_parameters()
        numbers |= self._gradients(grad_norm, device, due)
        numbers |= self._weights(device, due)
        if self._probe is not None and self._measured % self._config.probe_every == 1 % self._config.probe_every:
            with torch.no_grad():
                numbers["probe_loss"] = self._probe()
        if logits is not None:
            numbers |= output_signals(logits, labels)
        self.buffers.look()
        change = self.buffers.largest_change(device)
        if change is not None:
            numbers["buffer_change"] = change
        return Reading(tuple(numbers), _stacked(numbers, device))

    def start_anew(self) -> None:
        """Compare nothing with what was before: after a rewind."""
        self._sample.forget()
        self._moved = None
        self.buffers.look()
        self.buffers.look()

    def gradient_norm(self) -> float | None:
        """Return the norm of the gradients of all parts that act, read; for the moment of a fault."""
        norms = gradient_norms(self._acting, torch.device("cpu"))
        return None if norms is None else float(total_norm(norms))

    def state_dict(self) -> dict[str, Any]:
        """Return the count of measurements, and how far the weights moved since the last one."""
        moved = self._sample.change(self._acting, torch.device("cpu"), look=False)
        return {"measured": self._measured, "moved": None if moved is None else float(moved), "rate": float(self._rate)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; the weights must be those of that moment."""
        self._measured = int(state["measured"])
        self.start_anew()
        self._sort_parameters()
        self._sample.change(self._acting, torch.device("cpu"))
        self._moved, self._rate = state["moved"], float(state["rate"])

    def _sort_parameters(self) -> None:
        """Find the trained parameters, those of parts that do not act yet apart."""
        found = (parameter for optimizer in self._state.optimizers.values() for parameter in surgery.parameters_of(optimizer))
        trained = [parameter for parameter in found if parameter.requires_grad]
        self._isolated = isolated_parameters(self._isolating)
        apart = {id(parameter) for parameter in self._isolated}
        self._acting = [parameter for parameter in trained if id(parameter) not in apart] if apart else trained

    def _gradients(self, given: Number | None, device: torch.device, due: bool) -> dict[str, Number]:
        numbers: dict[str, Number] = {} if given is None else {"grad_norm": given}
        if self._isolated:
            norms = gradient_norms(self._isolated, device)
            if norms is not None:
                numbers["isolated_grad_norm"] = total_norm(norms)
        if given is not None and not due:
            return numbers
        norms = gradient_norms(self._acting, device)
        if norms is not None:
            numbers.setdefault("grad_norm", total_norm(norms))
            numbers["dead_share"] = 1.0 - torch.count_nonzero(norms) / len(self._acting)
        return numbers

    def _weights(self, device: torch.device, due: bool) -> dict[str, Number]:
        numbers: dict[str, Number] = {}
        update: Number | None = self._sample.change(self._acting, device)
        parameters = self._sample.parameters
        if self._moved is not None:
            update, self._moved = self._moved, None
        rate, self._rate = self._rate, self._largest_rate()
        if update is not None:
            numbers["update"] = update
            if isinstance(rate, Tensor) or rate > 0.0:
                numbers["update_per_rate"] = update / (rate.to(device) if isinstance(rate, Tensor) else rate)
        if due and parameters:
            numbers["weight_norm"] = total_norm(tensor_norms(parameters, device))
        return numbers

    def _largest_rate(self) -> Number:
        rates = [rate for optimizer in self._state.optimizers.values() for rate in surgery.live_rates(optimizer)]
        highest = max((rate for rate in rates if not isinstance(rate, Tensor)), default=0.0)
        tensors = [rate.detach().reshape(()).float() for rate in rates if isinstance(rate, Tensor)]
        return torch.stack(tensors).amax().clamp_min(highest) if tensors else highest


class WeightSample:
    """Some of the weights, and how far they moved since they were looked at before."""

    def __init__(self, size: int) -> None:
        """Look at up to ``size`` evenly spaced values of each tensor."""
        self._size = size
        self._key: list[tuple[int, int, int]] = []
        self.parameters: list[Parameter] = []
        self._views: list[list[Tensor]] = []
        self._before: list[Tensor] = []

    def forget(self) -> None:
        """Compare with nothing at the next call."""
        self._before = []

    def change(self, parameters: Sequence[Parameter], device: torch.device, look: bool = True) -> Tensor | None:
        """Return |w - w'| / |w'| on ``device``, w' as at the latest look; None if there is none to compare with.

        With ``look`` the weights as they are now become w'.
        """
        self._follow(parameters)
        with torch.no_grad():
            now = [torch.cat(views).float() for views in self._views]
            before = self._before
            if look:
                self._before = now
            if not before:
                return None
            moved, size = (total_norm(tensor_norms(values, device)) for values in (_foreach_sub(now, before), before))
            return moved / size.clamp_min(1e-12)

    def _follow(self, parameters: Sequence[Parameter]) -> None:
        """Make views anew if the parameters are not those of before, or lie elsewhere."""
        key = [(id(p), p.data_ptr() if p.layout is torch.strided else 0, p.numel()) for p in parameters]
        if key != self._key:
            self.parameters = [parameter for parameter in parameters if _is_plain(parameter)]
            self._key, self._before, self._views = key, [], _sampled(self.parameters, self._size)


def _sampled(parameters: Iterable[Parameter], size: int) -> list[list[Tensor]]:
    """Return views of the parameters' values, grouped by device and dtype; they follow what happens to the parameters.

    Of a large tensor these are stretches of 16 neighbours, which a processor reads at the price of one value.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
    for parameter in parameters:
        values, count = parameter.detach(), parameter.numel()
        if count <= size or size < _STRETCH:
            view = torch.as_strided(values, (min(size, count),), (max(1, count // size),))  # in the order of memory
        else:
            stretches = size // _STRETCH
            view = torch.as_strided(values, (stretches, _STRETCH), (count // stretches, 1))
        groups.setdefault((parameter.device, parameter.dtype, view.ndim), []).append(view)
    return list(groups.values())


def _is_plain(parameter: Parameter) -> bool:
    """Whether the values lie in memory without gaps, so that they can be looked at in the order of memory."""
    return (
        parameter.layout is torch.strided
        and parameter.is_floating_point()
        and parameter.numel() > 0
        and torch.ops.aten.is_non_overlapping_and_dense(parameter.detach())
    )


def _stacked(numbers: Mapping[str, Number], device: torch.device) -> Tensor:
    """Return the numbers as one tensor; a plain number is filled in on the device, as copying it there would wait."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    scalars: list[Tensor] = []
    with torch.no_grad():
        for name, value in numbers.items():
            if not isinstance(value, Tensor):
                scalars.append(torch.full((), value, dtype=dtype, device=device))
                continue
            if value.numel() != 1:
                raise ValueError(f"`{name}` must be one number, got a tensor of shape {tuple(value.shape)}. Reduce it first.")
            scalars.append((value.reshape(()) if value.ndim else value).to(device, dtype))
        return torch.stack(scalars)
