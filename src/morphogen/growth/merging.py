"""Merging: what a fossil computes becomes part of the host's own parameters.

A fossil with operator "add" makes h + alpha * s of the submodule's output h. Where s is linear in h, and h comes from a linear
layer, the sum is that layer with other weights; new hidden units become part of the two layers around them. Each kind of
blueprint says in one row of :data:`_FOLDS` how it folds.

Legend: W and b are weight and bias of the layer that makes h, one row for each of C channels; U, D are a low-rank map's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth.blueprints.low_rank import LowRank
from morphogen.growth.blueprints.norm import Norm
from morphogen.growth.blueprints.running_norm import RunningNorm
from morphogen.growth.blueprints.widen import Widen, WidenOptions
from morphogen.growth.host_changes import HostChanges, HostEdit, HostRecord, buffers_of, parameters_of, put
from morphogen.growth.layouts import Layout
from morphogen.growth.pairs import LAYOUTS_OF, Pair, channels_out, is_layer
from morphogen.growth.probing import Example, example_call, untouched
from morphogen.growth.slots import SeedSlot, hooks_of
from morphogen.state.surgery_grafts import Graft

_LAYOUTS_OF: Mapping[type[nn.Module], tuple[Layout, ...]] = {
    **LAYOUTS_OF,
    nn.BatchNorm1d: ("NC", "NCL"),
    nn.BatchNorm2d: ("NCHW",),
    nn.LayerNorm: ("NC", "NLC"),
    nn.GroupNorm: ("NC", "NCL", "NCHW"),
}
"""Layers whose channels a seed's feature may be -> its layouts."""


@dataclasses.dataclass(frozen=True)
class Fossil:
    """A fossil and where it sits.

    Attributes:
        host: The host.
        slot: Holds the seed.
        slots: All slots of the model.
        body: The blueprint's module.
        alpha: Its weight.
        shared: Whether several processes grow this model, each with buffers of its own.
    """

    host: nn.Module
    slot: SeedSlot
    slots: Mapping[str, SeedSlot]
    body: nn.Module
    alpha: float
    shared: bool

    @property
    def point(self) -> nn.Module:
        """The submodule at the growth point."""
        return self.host.get_submodule(self.slot.site.path)

    def name(self, below: str, key: str) -> str:
        """Return the host's name of a tensor or size of a part below the growth point."""
        return ".".join(part for part in (self.slot.site.path, below, key) if part)


def plan_merge(host: nn.Module, slot: SeedSlot, slots: Mapping[str, SeedSlot], shared: bool = False) -> HostEdit:
    """Return what the host becomes with the fossil in ``slot`` folded in; nothing is changed.

    Raises:
        SlotError: It cannot be folded; the message names the slot and the reason.
    """
    state, seed = slot.state, slot.seed
    assert seed is not None
    try:
        fold = next((fold for kind, fold in _FOLDS.items() if isinstance(seed.body, kind)), None)
        if fold is None:
            kinds = ", ".join(sorted(kind.__name__ for kind in _FOLDS))
            raise SlotError(f"must hold a seed that can be folded into linear layers ({kinds}), holds {state.blueprint!r}.")
        if state.operator != "add":
            raise SlotError(f'must have operator "add" to be merged, has {state.operator!r}, which is not linear.')
        if slot.site.output is not None:
            raise SlotError("must sit at a submodule that returns a tensor to be merged, its feature is one of several.")
        edit = fold(Fossil(host, slot, slots, seed.body, state.alpha, shared))
        _refuse_shared(host, edit)
        if shared and HostRecord().after(host, edit.values).changes:
            raise SlotError(
                "must not be merged where several processes train, as it changes the shapes or the number of the host's "
                "parameters, which DistributedDataParallel has fixed. Merge in a run of one process."
            )
    except SlotError as error:
        raise SlotError(f"slot {slot.name!r} {error}") from None
    return edit


@contextlib.contextmanager
def edited(host: nn.Module, changes: HostChanges, edit: HostEdit, unchanged: Callable[[], None]) -> Generator[None]:
    """Within the block the host is edited, and ``changes`` says how; if the block fails, it is as before to the bit.

    ``unchanged`` is called first; what it raises is the block's failure.
    """
    record = changes.record
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, changes, "record", record)
        changes.record = record.after(host, edit.values)
        undo.callback(put(host, edit.values))
        unchanged()
        changes.grafts = edit.grafts
        try:
            yield
        finally:
            changes.grafts = ()
        undo.pop_all()


def outputs_on(model: nn.Module, example: Example) -> list[Any]:
    """Return the leaves of what the model returns on the example, in eval mode, without a trace."""
    args, kwargs = example_call(example)
    with untouched(model):
        return pytree.tree_leaves(model(*args, **kwargs))


def check_kept(slot: str, before: list[Any], after: list[Any]) -> None:
    """Raise SlotError unless both are the same up to rounding: relative to the largest output, the root of the precision."""
    for ours, theirs in zip(before, after, strict=True):
        if not (isinstance(ours, Tensor) and ours.is_floating_point() and ours.numel()):
            continue
        scale = float(ours.abs().nan_to_num(0.0, 0.0).max())
        tolerance = torch.finfo(ours.dtype).eps ** 0.5 * max(scale, 1e-3)
        if not torch.allclose(ours, theirs, rtol=0.0, atol=tolerance, equal_nan=True):
            raise SlotError(
                f"slot {slot!r} must be mergeable without a change of the model's outputs, and is not: the host uses a layer "
                "inside it in another way than through the growth point, or its numbers are too coarse. Outputs move by "
                f"{float((ours - theirs).abs().max()):.3g}, at most {tolerance:.3g} is let pass."
            )


# -- folds --------------------------------------------------------------------------------------------------------------


def _fold_low_rank(fossil: Fossil) -> HostEdit:
    """W' = (I + alpha U D) W, b' likewise."""
    body = cast("LowRank", fossil.body)
    below, layer = _ending(fossil)
    if not is_layer(layer):
        raise SlotError(f"must sit at a submodule that ends in Linear, Conv1d or Conv2d to be merged, {_ends_in(layer)}.")
    if getattr(layer, "groups", 1) != 1:
        raise SlotError("must sit at a layer with groups=1 to be merged: a grouped convolution cannot mix its channels.")
    _check_channels(fossil, layer, channels_out(layer))
    up, down = (_wide(part.weight).flatten(1) for part in (cast("Any", body.up), cast("Any", body.down)))
    mixing = fossil.alpha * (up @ down)
    values: dict[str, int | Tensor] = {}
    for key, parameter in parameters_of(layer).items():
        if parameter is not None:
            old = _wide(parameter)
            added = (mixing @ old.reshape(len(old), -1)).view_as(old)
            values[fossil.name(below, key)] = (old + added).to(parameter.dtype)
    return HostEdit(values)


def _fold_norm(fossil: Fossil) -> HostEdit:
    """W' = (1 + k) W, b' = (1 + k) b + c per channel: k = alpha w / sqrt(var + eps), c = alpha b_seed - k mean."""
    body = cast("Norm", fossil.body)
    if not isinstance(body.norm, RunningNorm):
        raise SlotError('must have statistics "running" to be merged, has those of each sample, which are not linear.')
    if fossil.shared:
        raise SlotError("must not be merged where several processes train: each has running statistics of its own data.")
    if not int(body.norm.num_batches):
        raise SlotError("must have seen a batch in training mode to be merged: its running statistics are still to be set.")
    below, layer = _ending(fossil)
    weight = parameters_of(layer).get("weight")
    if weight is None or not (is_layer(layer) or type(layer) in _LAYOUTS_OF):
        kinds = "Linear, Conv1d, Conv2d or an affine BatchNorm, LayerNorm or GroupNorm"
        raise SlotError(f"must sit at a submodule that ends in {kinds} to be merged, {_ends_in(layer)}.")
    if not is_layer(layer) and weight.ndim != 1:
        raise SlotError("must sit at a LayerNorm over channels alone to be merged, this one has weights for more axes.")
    _check_channels(fossil, layer, weight.shape[0])
    norm_mean, norm_var = (_wide(tensor).flatten() for tensor in (body.norm.mean, body.norm.var))
    factor = fossil.alpha * _wide(body.weight).flatten() * (norm_var + body.norm.eps).rsqrt()
    shift = fossil.alpha * _wide(body.bias).flatten() - factor * norm_mean
    bias = parameters_of(layer)["bias"]
    old_bias = torch.zeros_like(shift) if bias is None else _wide(bias)
    scaled = _wide(weight) * (1.0 + factor).reshape(-1, *(1 for _ in weight.shape[1:]))
    new_bias = ((1.0 + factor) * old_bias + shift).to(weight.dtype)
    if bias is None:
        new_bias = Parameter(new_bias, requires_grad=weight.requires_grad)
    return HostEdit({fossil.name(below, "weight"): scaled.to(weight.dtype), fossil.name(below, "bias"): new_bias})


def _fold_widen(fossil: Fossil) -> HostEdit:
    """The first layer gets more rows, the second more columns (times alpha), a normalisation between more channels."""
    body = cast("Widen", fossil.body)
    pair = WidenOptions(**fossil.slot.state.options).pair_in(fossil.point)
    _check_undisturbed(fossil, pair)
    _check_last_in_line(fossil, fossil.point, fossil.slot.site.path)
    units = body.inner.weight.shape[0]
    (first_name, first), (second_name, second) = pair.first, pair.second
    edit = _Widening(fossil)
    edit.grow(first_name, first, body.inner, 0, 1.0)
    edit.grow(second_name, second, body.outer, 1, fossil.alpha)
    normalised = [(cast("str", name), part) for name, part in pair.middle if isinstance(part, _NORMS)]
    for (name, theirs), mine in zip(normalised, (part for part in body.middle if isinstance(part, _NORMS)), strict=True):
        edit.grow(name, theirs, mine, 0, 1.0)
        edit.resize(name, theirs, ("num_features", "num_channels"), units)
        if isinstance(mine, nn.GroupNorm):
            edit.resize(name, theirs, ("num_groups",), mine.num_groups)
    edit.resize(first_name, first, ("out_features", "out_channels"), units)
    edit.resize(second_name, second, ("in_features", "in_channels"), units)
    return HostEdit(edit.values, tuple(edit.grafts))


_FOLDS: Mapping[type[nn.Module], Callable[[Fossil], HostEdit]] = {
    LowRank: _fold_low_rank,
    Norm: _fold_norm,
    Widen: _fold_widen,
}
"""Blueprint's class (and its subclasses) -> what the host becomes with it folded in."""


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


class _Widening:
    """Collects what becomes of the layers around new units."""

    def __init__(self, fossil: Fossil) -> None:
        self._fossil = fossil
        self.values: dict[str, int | Tensor] = {}
        self.grafts: list[Graft] = []

    def grow(self, below: str, theirs: nn.Module, mine: nn.Module, dim: int, scale: float) -> None:
        """Join the tensors of a seed's layer, times ``scale``, to those of the host's that have them."""
        for key, parameter in parameters_of(mine).items():
            host = parameters_of(theirs)[key]
            if parameter is not None and host is not None:
                self.values[self._fossil.name(below, key)] = _joined(host, parameter * scale, dim)
                self.grafts.append(Graft(host, dim, parameter, scale))
        for key, buffer in buffers_of(mine).items():
            host_buffer = buffers_of(theirs)[key]
            if buffer is not None and host_buffer is not None and buffer.ndim:
                self.values[self._fossil.name(below, key)] = _joined(host_buffer, buffer, dim)

    def resize(self, below: str, theirs: nn.Module, keys: tuple[str, ...], more: int) -> None:
        """Count ``more`` under whichever of these keys the layer keeps its size."""
        for key in keys:
            if hasattr(theirs, key):
                self.values[self._fossil.name(below, key)] = cast("int", getattr(theirs, key)) + more


def _joined(host: Tensor, part: Tensor, dim: int) -> Tensor:
    """Return both, one after the other along ``dim``, in the memory format of the host's."""
    shape = list(host.shape)
    shape[dim] += part.shape[dim]
    last = host.ndim == 4 and host.is_contiguous(memory_format=torch.channels_last) and not host.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    joined = torch.empty(shape, dtype=host.dtype, device=host.device, memory_format=form)
    torch.cat([host.detach(), part.detach().to(host)], dim, out=joined)
    return joined


# -- what cannot be folded ------------------------------------------------------------------------------------------------


def _ending(fossil: Fossil) -> tuple[str, nn.Module]:
    """Return the layer that a submodule ends in, with its name below it; SlotError if something comes in between."""
    below, layer = "", fossil.point
    _check_last_in_line(fossil, layer, fossil.slot.site.path)
    while type(layer) is nn.Sequential and len(layer):
        name = list(dict(layer.named_children()))[-1]
        below, layer = f"{below}.{name}" if below else name, cast("nn.Module", layer[-1])
        _check_no_hooks(layer, fossil.name(below, ""))
    return below, layer


def _ends_in(layer: nn.Module) -> str:
    return f"this one ends in {type(layer).__name__}"


def _check_channels(fossil: Fossil, layer: nn.Module, count: int) -> None:
    site = fossil.slot.site
    if site.layout not in _LAYOUTS_OF[type(layer)] or count != site.width:
        raise SlotError(
            f"must sit at a layer whose channels are the feature's to be merged: {type(layer).__name__} has {count} of them, "
            f"the feature {site.width} in layout {site.layout}."
        )


def _check_last_in_line(fossil: Fossil, point: nn.Module, path: str) -> None:
    """Refuse hooks on the growth point that run before the slot's own, as they would see the merged feature."""
    before = itertools.takewhile(lambda hook: getattr(hook, "__self__", None) is not fossil.slot, hooks_of(point).values())
    if any(not _is_idle(hook) for hook in before):
        raise SlotError(f"must be alone at `{path}` to be merged: another hook or seed there comes before it.")


def _check_no_hooks(part: nn.Module, path: str) -> None:
    tables: tuple[Mapping[int, Any], ...] = (hooks_of(part), part._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    if any(not _is_idle(hook) for table in tables for hook in table.values()):
        raise SlotError(f"must not be merged: there is a hook or a seed at `{path}`, between the layer and the slot.")


def _is_idle(hook: object) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, SeedSlot) and owner.seed is None


def _check_undisturbed(fossil: Fossil, pair: Pair) -> None:
    """Refuse hooks inside the submodule, and slots that know how many hidden units there are."""
    below = {fossil.name(name, ""): part for name, part in fossil.point.named_modules() if name}
    for other in fossil.slots.values():
        if other.site.path in below.keys() - {fossil.name(pair.second[0], "")}:
            raise SlotError(f"must not be merged: slot {other.name!r} sits between the layers, on as many hidden units as now.")
    for path, part in below.items():
        _check_no_hooks(part, path)


def _refuse_shared(host: nn.Module, edit: HostEdit) -> None:
    """Refuse to change what the host also uses elsewhere: a layer with two names, tied weights, shared memory."""
    paths: dict[int, list[str]] = {}
    for path, module in host.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for name in edit.values:
        module = host.get_submodule(name.rpartition(".")[0])
        if len(paths[id(module)]) > 1:
            names = " and ".join(f"`{path}`" for path in paths[id(module)])
            raise SlotError(f"must not be merged: its layer is shared, as {names}.")
    memory: dict[int, list[str]] = {}
    for path, module in host.named_modules():
        for key, parameter in parameters_of(module).items():
            if parameter is not None and parameter.numel():
                memory.setdefault(parameter.untyped_storage().data_ptr(), []).append(f"{path}.{key}" if path else key)
    for names in memory.values():
        if len(names) > 1 and any(name in edit.values for name in names):
            raise SlotError(f"must not be merged: {' and '.join(f'`{name}`' for name in names)} share their memory.")


def _wide(tensor: Tensor) -> Tensor:
    """Return the values in at least single precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
