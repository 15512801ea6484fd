"""Conversions in every stage, mixed precision with and without a gradient scaler, memory formats."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import CheckpointError
from morphogen.growth import GrowableModel, Sowing, Stage, blueprints
from morphogen.growth.lifecycle import ACTING
from morphogen.state import TrainingState
from morphogen.testing import HostCase, host_cases, lead_to, same_bits

IMAGE, TOKENS = HostCase("NCHW"), HostCase("NLC")
SOWING = Sowing(blueprint="mlp", operator="gate", alpha_target=0.7, blend_ticks=7)
"""Alpha is no number of half precision at any tick."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A way to convert a model, and the inputs that it then takes."""

    name: str
    apply: Callable[[nn.Module], nn.Module]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, case: HostCase) -> Tensor:
        inputs = case.example(seed=3).to(self.dtype)
        return inputs.to(memory_format=torch.channels_last) if self.channels_last else inputs


CONVERSIONS = (
    Conversion("to bfloat16", lambda module: module.to(torch.bfloat16), torch.bfloat16),
    Conversion("to a tensor", lambda module: module.to(torch.zeros((), dtype=torch.float64)), torch.float64),
    Conversion("to cpu", lambda module: module.to("cpu")),
    Conversion("double", nn.Module.double, torch.float64),
    Conversion("half", nn.Module.half, torch.float16),
    Conversion("bfloat16", nn.Module.bfloat16, torch.bfloat16),
    Conversion("half and back", lambda module: module.half().float()),
    Conversion("channels_last", lambda module: module.to(memory_format=torch.channels_last), channels_last=True),
    Conversion(
        "channels_last bfloat16",
        lambda module: module.to(torch.bfloat16).to(memory_format=torch.channels_last),
        torch.bfloat16,
        channels_last=True,
    ),
)


def at_stage(stage: Stage, case: HostCase = IMAGE, sowing: Sowing = SOWING) -> GrowableModel:
    """A model whose early slot is in ``stage``, its seed with weights that do something."""
    model = case.model()
    if stage is not Stage.DORMANT:
        model.germinate("early", sowing)
        lead_to(model, "early", stage, case.example())
        stir(model)
    return model


def stir(model: GrowableModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


def trained(module: nn.Module, inputs: Tensor) -> list[Tensor | None]:
    """The output in training and the gradients."""
    module.zero_grad()
    output = module(inputs)
    output.float().square().mean().backward()
    host = module.host if isinstance(module, GrowableModel) else module
    return [output.detach(), *(parameter.grad for parameter in host.parameters())]


def check_alpha(model: GrowableModel, inputs: Tensor) -> None:
    """Alpha in the slot is that of the state, as far as its dtype can say, and it is alpha that acts."""
    slot = model.slot("early")
    assert slot.alpha.dtype in (torch.float32, torch.float64)
    assert float(slot.alpha) == float(torch.tensor(slot.state.alpha, dtype=slot.alpha.dtype))
    if slot.state.stage in ACTING:
        model.eval()
        with torch.no_grad():
            assert same_bits(model(inputs), model(inputs, alphas={"early": slot.state.alpha}))
        model.train()


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=str)
@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_a_conversion_in_any_stage(kit: Any, stage: Stage, conversion: Conversion) -> None:
    model, bare = conversion.apply(at_stage(stage)), conversion.apply(IMAGE.build())
    assert isinstance(model, GrowableModel)
    model.load_state_dict({f"host.{name}": tensor for name, tensor in bare.state_dict().items()}, strict=False)
    inputs = conversion.inputs(IMAGE)
    state = model.slot("early").state
    assert {p.dtype for p in model.parameters()} == {conversion.dtype}
    check_alpha(model, inputs)
    twin = copy.deepcopy(model)
    if stage in ACTING:
        assert not same_bits(model.eval()(inputs), bare.eval()(inputs))
        model.train(), bare.train()
        trained(model, inputs)
        assert all(p.grad is not None and p.grad.dtype == conversion.dtype for p in model.parameters())
    else:
        assert kit.same(trained(model, inputs), trained(bare, inputs))
        assert same_bits(model.eval()(inputs), bare.eval()(inputs))
        model.train()
    assert model.slot("early").state == state
    assert kit.same(trained(twin, inputs)[1:], [p.grad for p in model.host.parameters()]), "a copy is converted too"
    for each in (model, twin):
        each.tick()
        check_alpha(each, inputs)


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_newborn_is_as_its_host(conversion: Conversion, training: bool) -> None:
    model = at_stage(Stage.HOLDING)
    conversion.apply(model)
    model.train(training)
    model.germinate("late", "conv3x3")
    seed = model.slot("late").seed
    assert seed is not None and {part.training for part in seed.modules()} == {training}
    assert {parameter.dtype for parameter in seed.parameters()} == {conversion.dtype}
    kernels = [parameter for parameter in seed.parameters() if parameter.ndim == 4 and parameter.shape[2] > 1]
    assert kernels
    for kernel in kernels:
        assert kernel.is_contiguous(memory_format=torch.channels_last) == conversion.channels_last
    lead_to(model, "late", Stage.FOSSILIZED, conversion.inputs(IMAGE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_whole_ramp_is_exact_after_a_conversion(dtype: torch.dtype) -> None:
    model = at_stage(Stage.BLENDING, TOKENS).to(dtype)
    inputs, alphas = TOKENS.example().to(dtype), [model.alphas()["early"]]
    while model.slot("early").state.ramp is not None:
        model.tick()
        check_alpha(model, inputs)
        alphas.append(model.alphas()["early"])
    assert alphas == sorted(set(alphas)) and alphas[-1] == 0.7
    reference = at_stage(Stage.BLENDING, TOKENS)
    for alpha in alphas[1:]:
        reference.tick()
        assert reference.alphas()["early"] == alpha


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_to_meta_and_back(stage: Stage) -> None:
    model = at_stage(stage, TOKENS)
    ghost = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in (*ghost.parameters(), *ghost.buffers()))
    shape = ghost(TOKENS.example().to("meta")).shape
    ghost.to_empty(device="cpu")
    ghost.load_state_dict(model.state_dict())
    inputs = TOKENS.example()
    assert model(inputs).shape == shape and same_bits(ghost.eval()(inputs), model.eval()(inputs))
    assert same_bits(ghost.slot("early").alpha, model.slot("early").alpha)


@pytest.mark.parametrize(
    "conversion", [c for c in CONVERSIONS if c.name in ("half", "double", "channels_last bfloat16")], ids=str
)
def test_a_converted_run_is_saved_and_goes_on(kit: Any, tmp_path: Path, live_stage: Stage, conversion: Conversion) -> None:
    inputs = conversion.inputs(IMAGE)
    models = [at_stage(live_stage), IMAGE.model()]
    runs = [TrainingState(conversion.apply(m), torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)) for m in models]
    runs[0].save(tmp_path / "run")
    runs[1].load(tmp_path / "run")
    for _ in range(3):
        outputs: list[list[Tensor | None]] = []
        for model, run in zip(models, runs, strict=True):
            outputs.append(trained(model, inputs))
            run.optimizers[""].step()
            model.tick()
        assert kit.same(outputs[0], outputs[1])
        assert models[0].alphas() == models[1].alphas()
        assert same_bits(models[0].slot("early").alpha, models[1].slot("early").alpha)
    with pytest.raises(CheckpointError, match="float32 in the run"):
        plain = IMAGE.model()
        TrainingState(plain, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)).load(tmp_path / "run")


# -- autocast ------------------------------------------------------------------------------------------------------------


def features_of(host: nn.Module, inputs: Tensor, dtype: torch.dtype) -> tuple[list[torch.dtype], Tensor]:
    """Dtypes of what leaves the two growth points under autocast, and the output."""
    seen: list[torch.dtype] = []
    handles = [
        host.get_submodule(path).register_forward_hook(lambda part, args, output: seen.append(output.dtype))
        for path in ("norm", "body")
    ]
    with torch.autocast("cpu", dtype):
        output = host(inputs)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_autocast_in_every_live_stage(kit: Any, case: HostCase, live_stage: Stage, dtype: torch.dtype) -> None:
    model, bare, inputs = at_stage(live_stage, case), case.build(), case.example(seed=3)
    model.germinate("late", "norm")
    model.advance("late")
    model.host.load_state_dict(bare.state_dict())
    dtypes, output = features_of(model.host, inputs, dtype)
    expected_dtypes, expected = features_of(bare, inputs, dtype)
    assert dtypes == expected_dtypes and output.dtype == expected.dtype
    assert same_bits(output, expected) == (live_stage not in ACTING)
    for module, result in ((model, output), (bare, expected)):
        module.zero_grad()
        result.float().square().mean().backward()
    if live_stage not in ACTING:
        ours, theirs = ([p.grad for p in host.parameters()] for host in (model.host, bare))
        assert kit.same(ours, theirs)
    if live_stage is not Stage.GERMINATED:
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.slots.parameters())


@pytest.mark.parametrize("case", [IMAGE, TOKENS], ids=str)
def test_every_blueprint_blends_under_autocast(case: HostCase) -> None:
    for name in blueprints.names(case.layout):
        for operator in ("add", "scale", "gate"):
            model = case.model()
            model.germinate("early", name, operator=operator)
            with torch.autocast("cpu", torch.bfloat16):
                lead_to(model, "early", Stage.HOLDING, case.example())
                stir(model)
                output = model(case.example())
            output.float().square().mean().backward()
            gradients = [parameter.grad for _, parameter in model.owners()["early"]]
            assert all(g is not None and bool(g.isfinite().all()) and g.dtype == torch.float32 for g in gradients), name


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_channels_last_in_bfloat16_trains_every_blueprint(kit: Any, autocast: bool) -> None:
    """GroupNorm with weights in channels_last has crashed the process in backward behind a feature without a gradient."""
    for name in blueprints.names("NCHW"):
        for frozen in (False, True):
            bare, model = IMAGE.build(), IMAGE.model()
            for slot in ("early", "late"):
                model.germinate(slot, name)
                model.advance(slot)
            for module in (bare, model):
                module.to(torch.float32 if autocast else torch.bfloat16).to(memory_format=torch.channels_last)
                host = model.host if module is model else bare
                host.get_submodule("stem").requires_grad_(not frozen)
                host.get_submodule("norm").requires_grad_(not frozen)
            inputs = IMAGE.example(8).to(torch.float32 if autocast else torch.bfloat16)
            inputs = inputs.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found, expected = (trained(module, inputs) for module in (model, bare))
            assert kit.same(found, expected), name
            for slot in ("early", "late"):
                assert all(p.grad is not None for _, p in model.owners()[slot]), name


# -- gradient scaler -----------------------------------------------------------------------------------------------------


class ScaledRun:
    """fp16 autocast with a gradient scaler, on the CPU."""

    def __init__(self, scale: float = 2.0**10, **options: Any) -> None:
        self.model = TOKENS.model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
        self.state = TrainingState(self.model, self.optimizer, scaler=self.scaler)
        self.model.germinate("early", "low_rank")
        self.model.advance("early")
        self.number = 0

    def backward(self) -> None:
        self.number += 1
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = self.model(TOKENS.example(seed=self.number)).float().square().mean()
        self.scaler.scale(loss).backward()

    def step(self, **sense: Any) -> None:
        self.backward()
        self.model.sense(**sense)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.tick()

    def norm(self) -> float:
        reading = self.model.slot("early").sensors.gradient_norm
        assert reading is not None
        return reading.value


@pytest.mark.parametrize("scale", [2.0**10, 1000.0])
def test_sensors_see_unscaled_gradients(scale: float) -> None:
    run = ScaledRun(scale)
    run.backward()
    run.model.sense(run.scaler)
    found, ratio = run.norm(), run.model.slot("early").sensors.gradient_ratio
    run.scaler.unscale_(run.optimizer)
    run.model.sense()
    assert found == pytest.approx(run.norm(), rel=1e-5)
    assert ratio is not None and ratio.value == pytest.approx(run.model.slot("early").sensors.gradient_ratio.value, rel=1e-5)
    gradients = [p.grad.flatten() for _, p in run.model.owners()["early"] if p.grad is not None]
    naive = math.sqrt(float(torch.cat(gradients).square().mean()))
    assert found == pytest.approx(naive, rel=1e-5)
    run.model.sense(run.scaler)
    assert found == pytest.approx(run.norm(), rel=1e-5), "gradients that are unscaled already are not divided again"


def test_a_scaler_that_has_stepped_is_refused() -> None:
    run = ScaledRun()
    run.backward()
    run.scaler.step(run.optimizer)
    before = run.model.slot("early").sensors
    with pytest.raises(ValueError, match="`scaler` must not have stepped yet"):
        run.model.sense(run.scaler)
    assert run.model.slot("early").sensors is before
    run.scaler.update()
    run.model.sense()
    assert run.norm() > 0


def test_a_scaler_that_is_off_changes_nothing() -> None:
    run = ScaledRun(enabled=False)
    run.backward()
    run.model.sense()
    found = run.norm()
    run.model.sense(run.scaler)
    assert run.norm() == found


@pytest.mark.parametrize(("scale", "survives"), [(2.0**10, True), (1.0, False)])
def test_an_overflow_is_held_against_a_seed_only_at_the_lowest_scale(scale: float, survives: bool) -> None:
    run = ScaledRun(scale)
    run.step(scaler=run.scaler)
    before = run.model.slot("early").sensors
    run.backward()
    seed = run.model.owners()["early"][0][1]
    assert seed.grad is not None
    seed.grad.fill_(math.inf)
    run.model.sense(run.scaler)
    assert (run.model.slot("early").sensors is before) == survives
    run.model.tick()
    assert (run.model.stages()["early"] is Stage.TRAINING) == survives


def test_weights_that_are_not_finite_are_found_at_any_scale() -> None:
    run = ScaledRun()
    with torch.no_grad():
        run.model.owners()["early"][0][1].fill_(math.nan)
    run.backward()
    run.model.sense(run.scaler)
    assert run.model.tick()["early"] is Stage.PRUNED


def test_a_scaled_run_grows(kit: Any) -> None:
    """A scale that overflows at first, then TRAINING, BLENDING and HOLDING up to a fossil; chances of a fault at every step."""
    run = ScaledRun(scale=2.0**40, growth_interval=3)
    bare = TOKENS.build()
    bare.load_state_dict(run.model.host.state_dict())
    with torch.autocast("cpu", torch.float16):
        assert same_bits(run.model(TOKENS.example()), bare(TOKENS.example()))
    while run.scaler.get_scale() > 2.0**20:
        run.step(scaler=run.scaler)
        assert run.model.stages()["early"] is Stage.TRAINING
    for _ in range(3):
        run.step(scaler=run.scaler)
    run.backward()
    run.model.sense(run.scaler)
    assert run.model.advance("early").passed
    run.optimizer.zero_grad()
    run.scaler.update(run.scaler.get_scale())
    while run.model.slot("early").state.ramp is not None:
        run.step(scaler=run.scaler)
    lead_to(run.model, "early", Stage.FOSSILIZED, TOKENS.example())
    before = [p.detach().clone() for _, p in run.model.owners()["early"]]
    for _ in range(4):
        run.step(scaler=run.scaler)
    assert not kit.same(before, [p.detach() for _, p in run.model.owners()["early"]])
    run.state.verify()
