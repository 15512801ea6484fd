"""Hooks of the user's own on a grown submodule: their order, what they see, and that nothing of ours moves them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, Stage
from morphogen.growth.lifecycle import ACTING
from morphogen.testing import LENIENT, HostCase, lead_to, same_bits

CASE = HostCase("NLC")


class Watch:
    """Notes what its hooks see; a copy notes for itself."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor | None]] = []

    def before(self, module: nn.Module, args: Any) -> None:
        self.seen.append(("before", None))

    def early(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(("early", output.detach().clone()))

    def late(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(("late", output.detach().clone()))

    def with_kwargs(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.seen.append(("with_kwargs", output.detach().clone()))

    def back(self, module: nn.Module, grad_in: Any, grad_out: Any) -> None:
        self.seen.append(("back", grad_out[0].detach().clone()))

    def first(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(("first", output.detach().clone()))


def watched() -> tuple[GrowableModel, Watch]:
    """A growable model, hooks put on before and after it was made."""
    host, watch = CASE.build(), Watch()
    host.get_submodule("act").inplace = False  # torch refuses to write to what a full backward hook watches
    part = host.get_submodule("norm")
    part.register_forward_hook(watch.early)
    part.register_full_backward_hook(watch.back)
    model = GrowableModel(host, CASE.points, CASE.example(), config=LENIENT)
    watch.seen.clear()  # probing runs the host
    part.register_forward_pre_hook(watch.before)
    part.register_forward_hook(watch.late)
    part.register_forward_hook(watch.with_kwargs, with_kwargs=True)
    part.register_forward_hook(watch.first, prepend=True)
    return model, watch


def lead(model: GrowableModel, stage: Stage) -> None:
    if stage is Stage.DORMANT:
        return
    model.germinate("early", "mlp")
    lead_to(model, "early", stage, CASE.example())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def passed(model: GrowableModel, watch: Watch) -> tuple[list[str], dict[str, Tensor | None]]:
    watch.seen.clear()
    model.zero_grad()
    model(CASE.example()).square().mean().backward()
    return [name for name, _ in watch.seen], dict(watch.seen)


ORDER = ["before", "first", "early", "late", "with_kwargs", "back"]


def check(stage: Stage, names: list[str], seen: dict[str, Tensor | None]) -> None:
    """Hooks that were there before ours see the host's feature, those put on after it the grown one."""
    assert names == ORDER
    feature, grown = seen["first"], seen["late"]
    assert feature is not None and grown is not None
    assert same_bits(feature, seen["early"]) and same_bits(grown, seen["with_kwargs"])
    assert same_bits(feature, grown) == (stage not in ACTING)
    assert seen["back"] is not None and bool(seen["back"].any())


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_hooks_keep_their_order_and_see_what_they_saw(stage: Stage) -> None:
    model, watch = watched()
    lead(model, stage)
    check(stage, *passed(model, watch))
    twin = copy.deepcopy(model)
    hooks = list(twin.host.get_submodule("norm")._forward_hooks.values())
    own = next(hook.__self__ for hook in hooks if isinstance(hook.__self__, Watch))
    assert own is not watch
    check(stage, *passed(twin, own))
    names, seen = passed(model, watch)
    ours, theirs = seen["late"], dict(own.seen)["late"]
    assert names == ORDER and ours is not None and theirs is not None and same_bits(ours, theirs)


def test_hooks_survive_every_operation() -> None:
    model, watch = watched()
    part = model.host.get_submodule("norm")
    before = [list(getattr(part, table)) for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
    for end in (Stage.PRUNED, Stage.FOSSILIZED):
        lead(model, end)
        model.export()
        lead_to(model, "early", Stage.DORMANT, CASE.example())
    assert before == [list(getattr(part, table)) for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
    check(Stage.DORMANT, *passed(model, watch))


def test_a_hook_may_change_the_grown_feature_and_may_go() -> None:
    model, _ = watched()
    lead(model, Stage.HOLDING)
    plain = model(CASE.example())
    handle = model.host.get_submodule("norm").register_forward_hook(lambda module, args, output: output * 0.0)
    silenced = model(CASE.example())
    assert not same_bits(plain, silenced)
    model.prune("early")
    assert same_bits(model(CASE.example()), silenced), "behind a hook that silences it the seed is not seen"
    handle.remove()
    assert not same_bits(model(CASE.example()), silenced)
