"""What a fault may do to a step: change inputs, outputs, gradients, labels, weights, buffers, moments or learning rates."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from morphogen.state import TrainingState, surgery

Change = Callable[[Tensor], Tensor]


class Injection:
    """One fault at work in one step; made by :func:`morphogen.governor.faults.inject`.

    Whatever is hooked or scaled for the step is taken back by :meth:`close`; damage done in place stays.

    Attributes:
        state: The run.
        strength: How hard; what it means depends on the kind.
    """

    def __init__(self, kind: str, state: TrainingState, strength: float, generator: torch.Generator | None) -> None:
        """Do nothing yet."""
        self.kind, self.state, self.strength = kind, state, strength
        self._generator = generator
        self._undo = contextlib.ExitStack()
        self._waits_for: str | None = None
        self._label_changes: list[Change] = []

    def close(self) -> None:
        """Take back what was hooked or scaled for the step."""
        self._undo.close()

    @property
    def waits_for(self) -> str | None:
        """What the fault needs and has not met yet; None once it had its effect."""
        return self._waits_for

    def labels(self, labels: Tensor) -> Tensor:
        """Return ``labels`` as the fault leaves them: themselves, unless it is a fault of labels.

        Args:
            labels: Of shape (batch, ...), any dtype; not changed.
        """
        for change in self._label_changes:
            labels = self._met(change(labels))
        return labels

    # -- for the table of kinds -------------------------------------------------------------------------------------

    @property
    def generator(self) -> torch.Generator:
        """Where the fault draws from; ValueError if none was given."""
        if self._generator is None:
            raise ValueError(f"`generator` must be given for {self.kind}, which draws, got None. Pass a torch.Generator.")
        return self._generator

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal noise in the form of ``like``."""
        return torch.randn(like.shape, generator=self.generator, device=self.generator.device).to(like)

    def integer(self, end: int) -> int:
        """Return a drawn integer in [0, ``end``)."""
        return int(torch.randint(end, (), generator=self.generator, device=self.generator.device))

    def weights(self) -> list[Parameter]:
        """Every trainable floating-point parameter, each once, by model and order of registration."""
        found = {id(p): p for model in self.state.models.values() for p in model.parameters()}
        return self._some([p for p in found.values() if p.requires_grad and p.is_floating_point()], "trainable parameters")

    def layers(self) -> list[nn.Module]:
        """Every linear and convolution layer, the last of them being the head."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        modules = [m for model in self.state.models.values() for m in model.modules() if isinstance(m, kinds)]
        return self._some(modules, "linear or convolution layers")

    def statistics(self, name: str) -> list[Tensor]:
        """The buffers called ``name`` ("running_mean", "running_var") of all normalisation layers."""
        modules = [m for model in self.state.models.values() for m in model.modules()]
        found = [getattr(module, name, None) for module in modules]
        return self._some([buffer for buffer in found if isinstance(buffer, Tensor)], f"`{name}` buffers")

    def scale_moments(self, first: float = 1.0, second: float = 1.0) -> None:
        """Multiply the optimizers' moments, ``step`` kept; ValueError if there are none of that sort."""
        optimizers = self.state.optimizers.values()
        changed = sum(surgery.scale_moments(optimizer, first=first, second=second) for optimizer in optimizers)
        if not changed:
            order = "first" if first != 1.0 else "second"
            raise self._impossible(f"an optimizer with {order} moments after its first step")

    def scale_learning_rates(self) -> None:
        """Multiply learning rates by ``strength`` while an optimizer steps: schedules and rewinds never see it."""
        if not self.state.optimizers:
            raise self._impossible("an optimizer")
        for optimizer in self.state.optimizers.values():
            scaled = contextlib.ExitStack()

            def before(optimizer: Optimizer, given: Any, named: Any, scaled: contextlib.ExitStack = scaled) -> None:
                surgery.scale_learning_rates(optimizer, self.strength)
                scaled.callback(surgery.scale_learning_rates, optimizer, 1.0 / self.strength)

            def after(optimizer: Optimizer, given: Any, named: Any, scaled: contextlib.ExitStack = scaled) -> None:
                scaled.close()

            self._undo.callback(scaled.close)
            self._hooked(optimizer.register_step_pre_hook(before))
            self._hooked(optimizer.register_step_post_hook(after))

    def on_inputs(self, change: Change) -> None:
        """Change each floating-point input of the models in this step; of token models, the embeddings' outputs."""
        self._waits_for = "a forward pass with floating-point inputs, or through an nn.Embedding"
        for model in self.state.models.values():
            met = [False]

            def before(module: nn.Module, given: Any, named: Any, met: list[bool] = met) -> Any:
                found = list(_floating([given, named]))
                met[0] = bool(found)
                return (_changed(given, change, self._met), _changed(named, change, self._met)) if found else None

            def after(module: nn.Module, given: Any, output: Any, met: list[bool] = met) -> Any:
                return None if met[0] else _changed(output, change, self._met)

            self._hooked(model.register_forward_pre_hook(before, with_kwargs=True))
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    self._hooked(module.register_forward_hook(after))

    def on_outputs(self, change: Change) -> None:
        """Change each floating-point output of the models in this step."""
        self._waits_for = "a forward pass with floating-point outputs"

        def after(module: nn.Module, given: Any, output: Any) -> Any:
            return _changed(output, change, self._met)

        for model in self.state.models.values():
            self._hooked(model.register_forward_hook(after))

    def on_gradients(self, change: Change, parameters: Sequence[Parameter] | None = None) -> None:
        """Change the gradients of ``parameters``, by default of all trainable ones, as backward makes them in this step."""
        self._waits_for = "a backward pass"

        def hook(gradient: Tensor) -> Tensor:
            return self._met(change(gradient))

        for parameter in self.weights() if parameters is None else parameters:
            self._hooked(parameter.register_hook(hook))

    def on_labels(self, change: Change) -> None:
        """Change what :meth:`labels` is given in this step."""
        self._waits_for = "labels: pass them through `labels` of what `inject` or `at` gives"
        self._label_changes.append(change)

    def _hooked(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _met(self, changed: Tensor) -> Tensor:
        self._waits_for = None
        return changed

    def _some(self, found: list[Any], what: str) -> list[Any]:
        if not found:
            raise self._impossible(what)
        return found

    def _impossible(self, what: str) -> ValueError:
        return ValueError(f"`kind` must fit the run: {self.kind} needs {what}, and there are none. Choose another kind.")


@contextlib.contextmanager
def at_work(injections: Sequence[Injection]) -> Generator[None]:
    """Close all ``injections`` at the end, whatever happens; ValueError if one had no effect in a block that ended well."""
    with contextlib.ExitStack() as stack:
        for injection in injections:
            stack.callback(injection.close)
        yield
        for injection in injections:
            if injection.waits_for is not None:
                raise ValueError(
                    f"the block must make one training step: {injection.kind} had no effect, as it met no "
                    f"{injection.waits_for}. Put the whole step into the block."
                )


def _floating(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[Any, Any]", value).values():
            yield from _floating(item)
    elif isinstance(value, (list, tuple)):
        for item in cast("Sequence[Any]", value):
            yield from _floating(item)


def _changed(value: Any, change: Change, met: Change) -> Any:
    """Return ``value`` with every floating-point tensor in it changed; containers are copied."""
    if isinstance(value, Tensor):
        return met(change(value)) if value.is_floating_point() else value
    if isinstance(value, MutableMapping):
        copied = copy.copy(cast("MutableMapping[Any, Any]", value))
        for key in list(copied):
            copied[key] = _changed(copied[key], change, met)
        return copied
    if isinstance(value, (list, tuple)):
        items = [_changed(item, change, met) for item in cast("Sequence[Any]", value)]
        kind: Any = type(cast(Any, value))
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return value
