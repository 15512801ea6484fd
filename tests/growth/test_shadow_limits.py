"""Shadow passes that must not be, what breaks in them, and compiled models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, GrowthConfig, Sowing, Stage
from morphogen.growth.gates import Check
from morphogen.state import draw_from
from morphogen.testing import LENIENT, HostCase, host_cases

SHADOW = LENIENT.replace(incubator="shadow")
BLUEPRINTS = {"NC": "mlp", "NCL": "conv1d", "NLC": "low_rank", "NCHW": "conv3x3"}


def grown(case: HostCase, model: GrowableModel | None = None) -> GrowableModel:
    """A model that incubates a seed in both slots, with weights that matter."""
    model = model or case.model(config=SHADOW)
    for slot in model.stages():
        model.germinate(slot, Sowing(blueprint=BLUEPRINTS[case.layout]))
        model.advance(slot)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def gradients(model: GrowableModel, slot: str) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.owners()[slot]}


def test_a_shadow_pass_without_effect_is_an_error() -> None:
    case = HostCase("NC")
    model = grown(case)
    model.config = LENIENT
    assert not model.needs_shadow
    with pytest.raises(ValueError, match='`config.incubator` must be "shadow"'), model.shadow():
        pass
    model.config = SHADOW
    for slot in model.stages():
        model.prune(slot)
    assert not model.needs_shadow
    with pytest.raises(SlotError, match="none of early, late does"), model.shadow():
        pass
    with pytest.raises(ValueError, match="incubator"):
        GrowthConfig.model_validate({"incubator": "shadows"})


CHANGES: dict[str, Callable[[GrowableModel], object]] = {
    "another": lambda model: model.shadow().__enter__(),
    "tick": lambda model: model.tick(),
    "prune": lambda model: model.prune("early"),
    "config": lambda model: setattr(model, "config", LENIENT),
    "topology": lambda model: model.plan_topology(model.topology()).commit(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_nothing_changes_the_model_during_a_pass(kit: Any, change: str) -> None:
    run = kit.run(HostCase("NCHW"), config=SHADOW)
    model = grown(run.case, run.model)
    before, config = run.contents(), model.config
    with model.shadow(), pytest.raises(SlotError, match="a shadow pass is under way"):
        CHANGES[change](model)
    assert kit.differences(run.contents(), before) == [] and model.config is config
    model.tick()


def test_other_threads_are_refused() -> None:
    model, errors = grown(HostCase("NC")), list[BaseException]()

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except SlotError as error:
            errors.append(error)

    def enter() -> None:
        with model.shadow():
            pass

    with model.shadow():
        for call in (lambda: model(HostCase("NC").example()), enter):
            thread = threading.Thread(target=attempt, args=(call,))
            thread.start()
            thread.join()
        model(HostCase("NC").example()).sum().backward()
    assert [str(error).split(".")[0] for error in errors] == [
        "the model must be run by one thread while a shadow pass is under way",
        "a shadow pass is under way: no other can begin, and the model cannot be changed",
    ]
    enter()


# -- gates, quarantine, config ----------------------------------------------------------------------------------------------


def test_without_shadow_passes_a_seed_has_no_gradient_and_does_not_blend() -> None:
    model = grown(HostCase("NC"))
    model(HostCase("NC").example()).sum().backward()
    model.sense()
    gate = model.advance("early")
    assert gate.refusals == (Check.GRADIENT,)
    assert {check.check: check.value for check in gate.checks}[Check.GRADIENT] is None
    with model.shadow():
        model(HostCase("NC").example()).sum().backward()
    model.sense()
    assert model.advance("early").passed


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38])
@pytest.mark.parametrize("slots", [("early", "late"), ("late", "early")], ids="-".join)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_a_broken_seed_is_quarantined_alone(kit: Any, case: HostCase, slots: tuple[str, str], value: float) -> None:
    """It spoils neither the host nor the other seed, in front of it or behind it, nor what that one's gradient is."""
    (broken, sound), inputs = slots, case.example(8)
    model, bare = grown(case), case.build()
    target = copy.deepcopy(bare).eval()(inputs).detach() + 1.0
    alone = grown(case)
    alone.prune(broken)
    seed = model.slot(broken).seed
    assert seed is not None
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.fill_(value)
    for module in (model, bare, alone):
        optimizer = kit.optimizers["adam"](module.parameters())
        (module(inputs) - target).square().mean().backward()
        if isinstance(module, GrowableModel):
            with module.shadow():
                (module(inputs) - target).square().mean().backward()
        optimizer.step()
    assert kit.same(model.host.state_dict(), bare.state_dict())
    torch.testing.assert_close(gradients(model, sound), gradients(alone, sound))
    model.sense()
    assert model.tick() == {broken: Stage.PRUNED}


def test_a_seed_that_overflows_is_quarantined() -> None:
    """Its weights are finite, and left out of the pass it would have gradients of zero."""
    model = grown(HostCase("NC"))
    seed = model.slot("early").seed
    assert seed is not None
    with draw_from(torch.Generator().manual_seed(0)):
        seed.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.fill_(1e15)
    with model.shadow():
        model(HostCase("NC").example()).square().mean().backward()
    assert all(bool(parameter.isfinite().all()) for parameter in seed.parameters())
    model.sense()
    assert model.tick() == {"early": Stage.PRUNED}


def test_a_change_of_incubator_takes_effect_at_the_next_pass() -> None:
    case = HostCase("NC")
    model = grown(case)
    model.config = LENIENT
    model(case.example()).sum().backward()
    assert all(gradient is not None for gradient in gradients(model, "early").values())
    model.zero_grad()
    model.config = SHADOW
    assert model.needs_shadow and copy.deepcopy(model).needs_shadow
    model(case.example()).sum().backward()
    assert all(gradient is None for gradient in gradients(model, "early").values())


# -- compiled ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["model", "host", "wrapper"])
def test_a_compiled_model_shadows_uncompiled(fresh_compiler: None, part: str) -> None:
    """The gradients are the eager ones, before and after a shadow pass, and none compiles anything."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    case = HostCase("NCHW")
    model, twin = grown(case), grown(case)
    x, labels = case.example(), torch.tensor([0, 1, 2, 0])

    def step(module: Callable[..., Tensor], owner: GrowableModel) -> None:
        F.cross_entropy(module(x), labels).backward()
        with owner.shadow():
            F.cross_entropy(module(x), labels).backward()

    ours: Callable[..., Tensor] = twin
    if part == "wrapper":
        ours = torch.compile(twin, backend=backend)
    else:
        (twin if part == "model" else twin.host).compile(backend=backend)
    counts: list[int] = []
    for _ in range(3):
        for module in (model, twin):
            module.zero_grad()
        step(model, model)
        step(ours, twin)
        counts.append(len(graphs))
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7)
    assert counts[0] == counts[2] and counts[0] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_shadow_pass_inside_compiled_code_is_refused(fresh_compiler: None, kit: Any) -> None:
    run = kit.run(HostCase("NC"), config=SHADOW)
    model = grown(run.case, run.model)

    def step() -> None:
        with model.shadow():
            model(HostCase("NC").example()).sum().backward()

    before = run.contents()
    with pytest.raises(SlotError, match="outside compiled code"):
        torch.compile(step, backend="eager")()
    assert kit.differences(run.contents(), before) == []
    step()
