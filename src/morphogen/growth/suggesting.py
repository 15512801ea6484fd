"""Suggestions: growth points of a host nobody has looked into, found by one forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth import blueprints
from morphogen.growth.features import Output, Site, element, first_tensor
from morphogen.growth.layouts import Layout, infer_layout, is_sequence_first
from morphogen.growth.points import GrowthPoint, batch_sizes_of, check_ungrown, may_be_called, site_at
from morphogen.growth.probing import Example, example_call, untouched

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass(frozen=True)
class SuggestedPoint:
    """A growth point that :func:`suggest_points` found.

    Attributes:
        name: Its path as an identifier, for the slot.
        point: For ``GrowableModel(points=...)``: path, and layout and output where these do not tell themselves.
        shape: Of the feature on the example, as seeds get it.
        width: Channels of the feature.
        layout: Of the feature, as seeds get it.
        blueprints: Names of the blueprints that can be built for it from its width.
    """

    name: str
    point: GrowthPoint
    shape: tuple[int, ...]
    width: int
    layout: Layout
    blueprints: tuple[str, ...]

    @property
    def path(self) -> str:
        """Name of the submodule."""
        return self.point.path


def suggest_points(model: nn.Module, example: Example) -> tuple[SuggestedPoint, ...]:
    """Return the growth points of ``model``, best first; nothing of it is touched.

    Candidates are submodules that are called once and return a floating-point tensor, or a tuple or mapping that begins with
    one, of a layout that is known and with one entry per sample. Blocks, the children of ``Sequential`` and ``ModuleList``
    with layers of their own, come first, then single layers in such containers, then other layers, last what has no
    parameters and embeddings; among equals the outer before the inner, then the order of execution. Of submodules that return
    the same feature, such as a block and its last layer, the best one is named. Left out are the inputs, what the model
    returns, and all behind which no layer with parameters starts: growing there would be growing the outputs.

    Whether a seed may look ahead in a sequence is not for a forward pass to tell: in a causal model, give blueprints that mix
    positions their ``causal`` option.

    Args:
        model: Any module that ``GrowableModel`` could grow.
        example: As ``example_input`` of ``GrowableModel``. At least two samples, and sequences of another length, tell most.

    Raises:
        SlotError: The model belongs to a GrowableModel, or is lazy.

    Example:
        >>> from morphogen.growth import GrowableModel
        >>> blocks = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (1, 8)]
        >>> host = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 16, 2))
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> found = suggest_points(host, x)
        >>> [(each.path, each.layout, each.width) for each in found[:2]]
        [('0', 'NCHW', 8), ('1', 'NCHW', 8)]
        >>> model = GrowableModel(host, {each.name: each.point for each in found}, x)
    """
    check_ungrown(dict(model.named_modules()))
    watch = _Watch()
    output = watch.run(model, example)
    batch_sizes = batch_sizes_of(model, {path: [call.returned for call in calls] for path, calls in watch.calls.items()})
    sizes = batch_sizes or _leading_sizes(example)
    ends = _memory((example, output))
    found: dict[tuple[int, ...], tuple[_Call, GrowthPoint, Site]] = {}
    for call in sorted(watch.candidates(ends), key=lambda call: call.rank(model)):
        placed = _placed(call, model, batch_sizes)
        if placed is not None and (not sizes or placed[1].turned(call.feature).shape[0] in sizes):
            found.setdefault(call.key, (call, *placed))
    fitting: dict[tuple[int, Layout], tuple[str, ...]] = {}
    suggestions: dict[str, SuggestedPoint] = {}
    for call, point, site in found.values():
        kind = (site.width, site.layout)
        if kind not in fitting:
            fitting[kind] = _fitting(*kind)
        name = _name(point.path, suggestions)
        suggestions[name] = SuggestedPoint(name, point, tuple(site.turned(call.feature).shape), *kind, fitting[kind])
    return tuple(suggestions.values())


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a submodule that returned a feature.

    Attributes:
        path: Name of the submodule.
        returned: All of it.
        output: Where the feature is in it.
        feature: The feature.
        key: Equal for features in the same memory at the same state: views and what is passed on as it is.
        time: Counts starts and ends of submodules.
    """

    path: str
    returned: object
    output: Output | None
    feature: Tensor
    key: tuple[int, ...]
    time: int

    def rank(self, model: nn.Module) -> tuple[int, bool, int, int]:
        """Return what candidates are sorted by, best first."""
        part = model.get_submodule(self.path)
        contained = isinstance(model.get_submodule(self.path.rpartition(".")[0]), _CONTAINERS)
        if next(part.parameters(), None) is None or isinstance(part, nn.Embedding):
            tier = 3
        elif contained:
            tier = 0 if next(part.children(), None) is not None else 1
        else:
            tier = 2
        return tier, self.output is not None, self.path.count("."), self.time


class _Watch:
    """Notes what the submodules return in one pass."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}
        self._time = 0
        self._last_start = 0

    def run(self, model: nn.Module, example: Example) -> object:
        """Return the model's output."""
        args, kwargs = example_call(example)
        with contextlib.ExitStack() as stack:
            for path, part in model.named_modules():
                self.calls[path] = []
                if next(part.parameters(recurse=False), None) is not None:
                    stack.callback(part.register_forward_pre_hook(self._started).remove)
                stack.callback(part.register_forward_hook(self._recorder(path)).remove)
            stack.enter_context(untouched(model))
            return model(*args, **kwargs)

    def candidates(self, ends: Collection[int]) -> list[_Call]:
        """Return the calls that are the only one of their submodule, with layers behind them; ``ends`` are outputs."""
        alone = [calls[0] for calls in self.calls.values() if len(calls) == 1]
        return [
            call
            for call in alone
            if isinstance(call, _Call) and call.time < self._last_start and call.key[0] not in ends and call.path
        ]

    def _started(self, module: nn.Module, args: Any) -> None:
        self._time += 1
        self._last_start = self._time

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, args: Any, returned: object) -> None:
            self._time += 1
            self.calls[path].append(_call(path, returned, self._time))

        return record


@dataclasses.dataclass(frozen=True)
class _NoFeature:
    returned: object


def _call(path: str, returned: object, time: int) -> _Call | _NoFeature:
    output: Output | None = None
    if not isinstance(returned, Tensor):
        index = first_tensor(returned)
        output = next(iter(cast("dict[str, Any]", returned))) if isinstance(returned, dict) and index == 0 else index
    feature = element(returned, output)
    if output not in (None, 0) and not isinstance(output, str):
        return _NoFeature(returned)
    if not isinstance(feature, Tensor) or not feature.is_floating_point() or feature.is_nested:
        return _NoFeature(returned)
    where = (feature.untyped_storage().data_ptr(), int(feature.storage_offset()), feature.numel())
    version = feature._version  # pyright: ignore[reportPrivateUsage]
    return _Call(path, returned, output, feature.detach(), (*where, version), time)


def _placed(call: _Call, model: nn.Module, batch_sizes: Collection[int]) -> tuple[GrowthPoint, Site] | None:
    """Return point and site of a candidate; the layers around it tell the layout where those inside do not. None: unknown."""
    point = GrowthPoint(call.path, None, call.output)
    with contextlib.suppress(SlotError):
        return point, site_at(point, call.feature, model, batch_sizes)
    around = call.path
    while around:
        around = around.rpartition(".")[0]
        with contextlib.suppress(SlotError):
            layout = infer_layout(call.feature, model.get_submodule(around))
            turned = layout == "NLC" and is_sequence_first(call.feature, model.get_submodule(call.path), model, batch_sizes)
            point = GrowthPoint(call.path, "LNC" if turned else layout, call.output)
            return point, site_at(point, call.feature, model, batch_sizes)
    return None


def _memory(tree: object) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def _leading_sizes(example: Example) -> set[int]:
    """Return the number of samples in the example; nothing if it holds no tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    return {tensors[0].shape[0]} if tensors else set()


def _fitting(width: int, layout: Layout) -> tuple[str, ...]:
    """Return the names of the blueprints that can be built; on the meta device, where nothing is drawn."""
    names: list[str] = []
    for name in blueprints.names(layout):
        with contextlib.suppress(ValueError), torch.device("meta"):
            blueprints.get(name).build(width, layout)
            names.append(name)
    return tuple(names)


def _name(path: str, taken: Collection[str]) -> str:
    name = path.replace(".", "_")
    if not may_be_called(name):
        name = f"point_{name}"
    while name in taken:
        name += "_"
    return name
