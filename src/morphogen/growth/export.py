"""Export: a growing model as a plain module that knows nothing of growth."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections.abc import Collection, Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY  # pyright: ignore[reportPrivateUsage]
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth.caches import CacheGuard
from morphogen.growth.features import Output, Site, key_of
from morphogen.growth.operators import Seed
from morphogen.growth.probing import Example, example_call, observe, untouched
from morphogen.growth.slots import SeedSlot, hooks_of

_PLAIN = (bool, int, float, str, tuple, type(None))
_HOOK_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_ALL_HOOK_TABLES = (*_HOOK_TABLES, "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def exported(host: nn.Module, slots: Mapping[str, SeedSlot], example: Example) -> nn.Module:
    """Return a copy of ``host`` in eval mode with the acting seeds built into it, and no hook of ours.

    Each grown submodule becomes a ``torch.fx.GraphModule`` made of the submodule and the seed's torch layers, and a module
    whose class is morphogen's becomes one by tracing, so the result consists of the host's own classes and torch's. It trains,
    moves and saves like any other module. Host and copy run on the example, without a trace.

    Raises:
        SlotError: The copy computes something else, or cannot run.
    """
    args, kwargs = example_call(example)
    with untouched(host):
        expected = pytree.tree_leaves(host(*args, **kwargs))
    plain = _plain_module(host, slots, example)
    for ours, theirs in zip(expected, _outputs(plain, example), strict=True):
        if isinstance(ours, Tensor) and not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4, equal_nan=True):
            raise SlotError(
                "the exported module must compute what the model does, and does not: the host reaches a grown submodule "
                "other than through its registered name. Register it once, and call it by that name."
            )
    return plain


def _plain_module(host: nn.Module, slots: Mapping[str, SeedSlot], example: Example) -> nn.Module:
    behind = {name: _hooks_behind(host, slot) for name, slot in slots.items()}
    acting = [slot for slot in slots.values() if slot.seed is not None and slot.mix in ("blend", "full")]
    nested = {slot.site.path for slot in acting if slot.site.output is not None}
    returned = observe(host, nested, example) if nested else {}
    with _unhooked(host, slots):
        plain = copy.deepcopy(host)
    for slot in sorted(acting, key=lambda slot: _depth(slot.site.path), reverse=True):  # a path leads through its parents
        base = plain.get_submodule(slot.site.path)
        grown = _grown(base, slot, next(iter(returned.get(slot.site.path, [])), None))
        _move_hooks(base, grown, behind[slot.name])
        plain = _replaced(plain, base, grown)
    _close_shortcuts(plain)
    return _without_our_classes(plain.eval())


def _outputs(plain: nn.Module, example: Example) -> list[Any]:
    """Return the leaves of what the plain module returns; grown submodules into which the host looks are opened."""
    args, kwargs = example_call(example)
    opened: set[int] = set()
    while True:
        try:
            with untouched(plain):
                return pytree.tree_leaves(plain(*args, **kwargs))
        except (AttributeError, TypeError) as error:
            grown = getattr(error, "obj", None)
            if not _is_grown(grown) or id(grown) in opened:
                raise SlotError(
                    f"the host must call its grown submodules and no more than read their parts, to be exported: {error}. "
                    "Move the growth point to a submodule whose methods the host does not use."
                ) from error
            opened.add(id(grown))
            _open(cast("fx.GraphModule", grown))


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _is_ours(hook: object, slot: SeedSlot) -> bool:
    return getattr(hook, "__self__", None) is slot


def _hooks_behind(host: nn.Module, slot: SeedSlot) -> list[int]:
    """Return the keys of hooks that run after ours, and so see the grown feature."""
    hooks = hooks_of(host.get_submodule(slot.site.path))
    keys = list(hooks)
    ours = next(index for index, key in enumerate(keys) if _is_ours(hooks[key], slot))
    return keys[ours + 1 :]


def _move_hooks(base: nn.Module, grown: nn.Module, keys: list[int]) -> None:
    for name in _HOOK_TABLES:
        table: dict[int, Any] = getattr(base, name)
        getattr(grown, name).update({key: table.pop(key) for key in keys if key in table})


@contextlib.contextmanager
def _unhooked(host: nn.Module, slots: Mapping[str, SeedSlot]) -> Generator[None]:
    """Take our hooks off while the host is copied; other people's hooks stay and are copied."""
    ours = tuple(slots.values())
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for part in host.modules():
        tables: list[dict[int, Any]] = [getattr(part, name) for name in _ALL_HOOK_TABLES]
        keys = [key for table in tables for key, hook in table.items() if _is_one_of_ours(hook, ours)]
        if keys:
            kept += [(table, dict(table)) for table in tables]
            for table in tables:
                for key in keys:
                    table.pop(key, None)
    try:
        yield
    finally:
        for table, before in kept:
            table.clear()
            table.update(before)


def _is_one_of_ours(hook: object, slots: Collection[SeedSlot]) -> bool:
    return isinstance(getattr(hook, "__self__", None), CacheGuard) or any(_is_ours(hook, slot) for slot in slots)


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Return ``root`` with ``new`` in place of ``old`` under every name it is registered by."""
    if root is old:
        return new
    places = [path.rpartition(".") for path, part in root.named_modules(remove_duplicate=False) if part is old]
    for parent, _, name in places:
        setattr(root.get_submodule(parent), name, new)
    return root


class _Tail(nn.Module):
    """What a seed adds to a feature, in the form that is traced into plain operations."""

    def __init__(self, seed: Seed, alpha: float) -> None:
        super().__init__()
        self.seed = seed
        self._alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        return self._mixed(h, self.seed(h))

    def _mixed(self, h: Tensor, residual: Tensor) -> Tensor:
        return h + (residual if self._alpha == 1.0 else residual * self._alpha)


class _TailOnInput(_Tail):
    """The same of a seed that reads what goes into the submodule."""

    def forward(self, h: Tensor, source: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._mixed(h, self.seed(h, source))


def _grown(base: nn.Module, slot: SeedSlot, returned: object) -> nn.Module:
    """Return the submodule with its seed; it takes the arguments that the submodule takes.

    Args:
        base: The submodule, a copy.
        slot: Holds the seed, which is copied.
        returned: What the submodule returns, where the feature is an element of it.
    """
    root = nn.Module()
    root.base = base
    seed = copy.deepcopy(cast("Seed", slot.seed))
    added = (_TailOnInput if seed.reads_input else _Tail)(seed, float(slot.alpha))
    tail = fx.Tracer().trace(added)
    for node in tail.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _taken_over(root, added, str(node.target))
    graph = fx.Graph()
    placeholders = [node for node in tail.nodes if node.op == "placeholder"]
    whole = _call_base(graph, base)
    feature = _turned(graph, slot.site, _element(graph, slot.site, whole, returned))
    given = [feature, _turned(graph, slot.site, _first_argument(graph))] if seed.reads_input else [feature]
    grown = graph.graph_copy(tail, dict(zip(placeholders, given, strict=True)))
    graph.output(_put_back(graph, slot.site, whole, _turned(graph, slot.site, cast("fx.Node", grown)), returned))
    return fx.GraphModule(root, graph, class_name="Grown")


def _turned(graph: fx.Graph, site: Site, feature: fx.Node) -> fx.Node:
    return graph.call_method("transpose", (feature, 0, 1)) if site.sequence_first else feature


def _element(graph: fx.Graph, site: Site, whole: fx.Node, returned: object) -> fx.Node:
    if site.output is None:
        return whole
    return graph.call_function(operator.getitem, (whole, _key(site, returned)))


def _put_back(graph: fx.Graph, site: Site, whole: fx.Node, feature: fx.Node, returned: object) -> fx.Node:
    """Return what the submodule returned with the grown feature in it, as :meth:`Site.replaced` does."""
    if site.output is None:
        return feature
    key = _key(site, returned)
    if isinstance(key, str):
        parts = graph.call_function(copy.copy, (whole,))
        graph.call_function(operator.setitem, (parts, key, feature))
        return parts
    names = getattr(returned, "_fields", None)
    if names is not None:
        return graph.call_method("_replace", (whole,), {names[key]: feature})
    front = graph.call_function(operator.getitem, (whole, slice(None, key)))
    back = graph.call_function(operator.getitem, (whole, slice(key + 1, None)))
    middle = [feature] if isinstance(returned, list) else (feature,)
    return graph.call_function(operator.add, (graph.call_function(operator.add, (front, middle)), back))


def _key(site: Site, returned: object) -> Output:
    assert site.output is not None
    return key_of(cast("Mapping[str, Any]", returned), site.output) if isinstance(returned, Mapping) else site.output


def _close_shortcuts(plain: nn.Module) -> None:
    """Let torch's Transformer call its grown parts in inference too, where it would nest tensors and use weights alone."""
    for part in plain.modules():
        if isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(map(_is_grown, part.modules())):
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False
            else:
                part.activation_relu_or_gelu = 0  # read by the shortcut alone


def _is_grown(module: object) -> bool:
    return isinstance(module, fx.GraphModule) and "base" in dict(module.named_children())


def _open(grown: fx.GraphModule) -> None:
    """Give a grown submodule the parts and plain attributes of the submodule inside it, for a host that reads them.

    They are the same objects under a second name. What the graph does not mention, a copy of a GraphModule would lose.
    """
    base = cast("nn.Module", grown.base)
    if _is_grown(base):
        _open(cast("fx.GraphModule", base))
    parts = [*base.named_children(), *base.named_parameters(recurse=False), *base.named_buffers(recurse=False)]
    first = next(node for node in grown.graph.nodes if node.op != "placeholder")
    for name, part in parts:
        if hasattr(grown, name):
            continue
        if isinstance(part, nn.Module | nn.Parameter):
            setattr(grown, name, part)
        else:
            grown.register_buffer(name, part, persistent=False)
        with grown.graph.inserting_before(first):
            grown.graph.get_attr(name)
    values = {name: value for name, value in vars(base).items() if isinstance(value, _PLAIN) and not hasattr(grown, name)}
    for name, value in values.items():
        setattr(grown, name, value)
    grown.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {**grown.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}), **values}
    grown.recompile()


class _Tracer(fx.Tracer):
    """Looks into modules whose class is morphogen's, and calls all others."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _has_our_class(m)


def _has_our_class(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "morphogen"


def _without_our_classes(plain: nn.Module) -> nn.Module:
    for part in reversed(list(plain.modules())):  # parts before the whole
        if _has_our_class(part):
            plain = _replaced(plain, part, _traced(part))
    return plain


def _traced(part: nn.Module) -> nn.Module:
    """Return a module of torch's that computes what ``part`` does in eval mode, under the same names."""
    try:
        graph = _Tracer().trace(part)
    except (TypeError, ValueError, RuntimeError, TraceError) as error:
        raise SlotError(
            f"a module of class {type(part).__qualname__} cannot be exported, as its forward cannot be traced: {error}. "
            "Let nothing in it depend on the values or the shape of its inputs."
        ) from error
    traced = fx.GraphModule(part, graph, class_name=type(part).__name__)
    for name in _ALL_HOOK_TABLES:
        getattr(traced, name).update(getattr(part, name))
    return traced.eval()


def _taken_over(root: nn.Module, owner: nn.Module, path: str) -> str:
    """Put what ``owner`` has at ``path`` directly into ``root``, as a short path is looked up faster; return its name there."""
    found: object = operator.attrgetter(path)(owner)
    name = path.replace("seed.body.", "seed_").replace("seed.gate.", "gate_").replace(".", "_")
    while getattr(root, name, found) is not found:
        name += "_"
    if isinstance(found, nn.Module | nn.Parameter):
        setattr(root, name, found)
    else:
        root.register_buffer(name, cast("Tensor", found))
    return name


def _first_argument(graph: fx.Graph) -> fx.Node:
    first = next(node for node in graph.nodes if node.op == "placeholder")
    return graph.call_function(operator.getitem, (first, 0)) if str(first.target).startswith("*") else first


def _call_base(graph: fx.Graph, base: nn.Module) -> fx.Node:
    parameters = inspect.signature(base.forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        return graph.call_function(functional_call, (graph.get_attr("base"), {}, args, kwargs))
    nodes = {parameter: graph.placeholder(parameter.name, default_value=parameter.default) for parameter in parameters}
    named: dict[str, Any] = {
        parameter.name: node for parameter, node in nodes.items() if parameter.kind is parameter.KEYWORD_ONLY
    }
    return graph.call_module("base", tuple(node for node in nodes.values() if node not in named.values()), named)
