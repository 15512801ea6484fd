"""How a framework's optimizer step is held back, and how its loss is seen where it shows none: shared by all adapters."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS
from torch.overrides import TorchFunctionMode

from morphogen.governor import GovernorConfig


class Interception:
    """Puts a function of one's own in the place of one method of one object, until :meth:`remove`.

    Args:
        target: The object; its class and its other methods stay as they are.
        name: The method's name.
        call: Called in its place as ``call(method, *args, **kwargs)``.
    """

    def __init__(self, target: Any, name: str, call: Callable[..., Any]) -> None:
        """Put ``call`` in place."""
        self._target, self._name, self._call = target, name, call
        self._before: Any = vars(target).get(name)
        method = getattr(target, name)

        @functools.wraps(method)  # torch's schedulers leave marks on an optimizer's step and look for them
        def intercepted(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(method, *args, **kwargs)

        self._bound = types.MethodType(intercepted, target)
        setattr(target, name, self._bound)

    def remove(self) -> None:
        """Put the method back. If somebody has put theirs on top meanwhile, ours passes every call through from now on."""
        self._call = _pass_on
        if vars(self._target).get(self._name) is not self._bound:
            return
        if self._before is None:
            delattr(self._target, self._name)
        else:
            setattr(self._target, self._name, self._before)


class StepGate:
    """While :attr:`held`, ``optimizer.step`` changes nothing: no parameter, no moment, no step count.

    A closure given to ``step`` is run first, with gradients enabled as every torch optimizer does, so that whoever decides can
    do so inside it; then the step is taken or not.

    Args:
        optimizer: A ``torch.optim`` optimizer, or a wrapper with a method ``step``.
        scaler: A gradient scaler whose ``step`` and ``update`` are held back too.

    Raises:
        ValueError: The optimizer is LBFGS, which calls its closure many times within one step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> gate = StepGate(optimizer)
        >>> gate.held, weight.grad = True, torch.ones(1)
        >>> optimizer.step()
        >>> weight.item()
        1.0
        >>> gate.remove()
    """

    def __init__(self, optimizer: Any, scaler: Any = None) -> None:
        """Put the gate in place, open."""
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "`optimizer` must take a step from the gradients of one backward pass, got LBFGS. Use a first-order optimizer."
            )
        self.held = False
        self._interceptions = [Interception(optimizer, "step", self._step)]
        if scaler is not None:
            self._interceptions += [Interception(scaler, name, self._unless_held) for name in ("step", "update")]

    def _step(self, method: Callable[..., Any], closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        result = self._unless_held(method, *args, **kwargs)
        return result if closure is None else loss

    def _unless_held(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if self.held else method(*args, **kwargs)

    def remove(self) -> None:
        """Take the gate away; every step is taken from now on."""
        self.held = False
        for interception in reversed(self._interceptions):
            interception.remove()
        self._interceptions = []


class BackwardWatch(TorchFunctionMode):
    """While open, sees the loss of every ``loss.backward()`` and the gradients it leaves, before anybody clips them.

    Open it shortly before ``backward`` and close it shortly after: each call of torch in between takes microseconds longer.

    Args:
        parameters: Those whose gradients count.
        scaler: The gradient scaler that scales the loss, if any.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> watch = BackwardWatch([weight])
        >>> watch.open()
        >>> (0.5 * weight.square().sum()).backward()
        >>> watch.close()
        >>> [number.item() for number in watch.take()]
        [12.5, 5.0]
    """

    def __init__(self, parameters: Iterable[Parameter], scaler: Any = None) -> None:
        """Watch nothing yet."""
        super().__init__()
        self._parameters, self._scaler = list(parameters), scaler
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._open = False

    def open(self) -> None:
        """Begin to watch; nothing happens if it is open."""
        if not self._open:
            self._open = True
            self.__enter__()

    def close(self) -> None:
        """Watch no longer; nothing happens if it is closed. Not to be called from within ``backward``."""
        if self._open:
            self._open = False
            self.__exit__(None, None, None)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return the sum of the losses since the last call and the gradient norm after the last of them; None without any."""
        losses, norm = self._losses, self._norm
        self._losses, self._norm = [], None
        return None if norm is None else (torch.stack(losses).sum(), norm)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let ``func`` do what it does."""
        result = func(*args, **(kwargs or {}))
        if func is Tensor.backward:
            loss = args[0].detach()
            scale = torch.ones_like(loss) if self._scaler is None else self._scaler.scale(torch.ones_like(loss))
            self._losses.append(loss / scale)
            self._norm = get_total_norm([held.grad for held in self._parameters if held.grad is not None]) / scale
        return result


def for_data_that_goes_on(config: GovernorConfig) -> GovernorConfig:
    """Return ``config`` for a run whose batches do not come again after a rewind, so that there are none to pass over."""
    return config.model_copy(update={"skip_window_steps": 0})


def _pass_on(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
