"""Incubation: the host does not feel the seed, to the bit; the seed learns and stays bounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, Stage
from morphogen.growth.incubation import straight_through
from morphogen.growth.lifecycle import OPERATORS, Operator, Sowing
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

STEPS = 12
BLUEPRINTS = {"NC": "mlp", "NCL": "conv1d", "NLC": "low_rank", "NCHW": "conv3x3"}


def incubating(case: HostCase, operator: Operator = "add") -> GrowableModel:
    """A model whose two slots incubate a seed each."""
    model = case.model()
    for slot in model.stages():
        model.germinate(slot, Sowing(blueprint=BLUEPRINTS[case.layout], operator=operator))
        model.advance(slot)
    return model


def data(case: HostCase, host: nn.Module) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = copy.deepcopy(host).eval()(case.example()).shape
    return [
        (torch.randn(case.example().shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(STEPS)
    ]


def poison(model: GrowableModel, kind: str) -> None:
    """Give every seed weights that make its residual huge, infinite or NaN."""
    value = {"huge": 1e8, "infinite": torch.inf, "nan": torch.nan}[kind]
    for slot in model.stages():
        seed = model.slot(slot).seed
        assert seed is not None
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.fill_(value)


def assert_host_alone(kit: Any, model: GrowableModel, bare: nn.Module, optimizers: list[Any]) -> None:
    """Weights, buffers, gradients and optimizer state of the host are those of the run without seeds."""
    grown, alone = dict(model.host.named_parameters()), dict(bare.named_parameters())
    assert kit.same(model.host.state_dict(), bare.state_dict())
    assert kit.same({n: p.grad for n, p in grown.items()}, {n: p.grad for n, p in alone.items()})
    ours, theirs = (optimizer.state for optimizer in optimizers)
    assert kit.same({n: ours[p] for n, p in grown.items()}, {n: theirs[p] for n, p in alone.items()})


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_training_is_bit_identical_to_training_without_seeds(
    kit: Any, case: HostCase, operator: Operator, optimizer: str
) -> None:
    bare, model = case.build(), incubating(case, operator)
    seeds = copy.deepcopy(model.slots.state_dict())
    optimizers = [kit.optimizers[optimizer](module.parameters()) for module in (model, bare)]
    for inputs, target in data(case, bare):
        ours, theirs = (
            kit.train_step(module, steps, inputs, target) for module, steps in zip((model, bare), optimizers, strict=True)
        )
        assert kit.same(ours, theirs)
        assert_host_alone(kit, model, bare, optimizers)
    moved = [name for name, tensor in model.slots.state_dict().items() if not torch.equal(tensor, seeds[name])]
    assert set(moved) == set(seeds), "every parameter of the seeds learns meanwhile"


@pytest.mark.parametrize("kind", ["huge", "infinite", "nan"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_a_poisoned_seed_does_not_reach_the_host(kit: Any, case: HostCase, operator: Operator, kind: str) -> None:
    bare, model = case.build(), incubating(case, operator)
    optimizers = [kit.optimizers["adam"](module.parameters()) for module in (model, bare)]
    for inputs, target in data(case, bare)[:3]:
        poison(model, kind)
        ours, theirs = (
            kit.train_step(module, steps, inputs, target) for module, steps in zip((model, bare), optimizers, strict=True)
        )
        assert kit.same(ours, theirs)
        assert_host_alone(kit, model, bare, optimizers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_other_dtypes(kit: Any, case: HostCase, dtype: torch.dtype) -> None:
    bare, model = case.build().to(dtype), incubating(case).to(dtype)
    for module in (bare, model):
        module(case.example().to(dtype)).square().mean().backward()
    expected = {name: p.grad for name, p in bare.named_parameters()}
    assert kit.same({name: p.grad for name, p in model.host.named_parameters()}, expected)
    for slot in model.stages():
        gradients = [parameter.grad for _, parameter in model.owners()[slot]]
        assert any(g is not None and bool(g.any()) and g.dtype == dtype for g in gradients)


@pytest.mark.parametrize("operator", OPERATORS)
def test_channels_last(kit: Any, operator: Operator) -> None:
    case = HostCase("NCHW")
    bare, model = (module.to(memory_format=torch.channels_last) for module in (case.build(), incubating(case, operator)))
    inputs = case.example(8).to(memory_format=torch.channels_last)
    forms: list[bool] = []
    for module, host in ((bare, bare), (model, model.host)):
        watch = lambda part, args, out: forms.append(out.is_contiguous(memory_format=torch.channels_last))  # noqa: E731
        host.get_submodule("body").register_forward_hook(watch)
        module(inputs).square().mean().backward()
    assert forms == [True, True]
    expected = {name: p.grad for name, p in bare.named_parameters()}
    assert kit.same({name: p.grad for name, p in model.host.named_parameters()}, expected)


def test_channels_last_behind_a_frozen_stem() -> None:
    """The feature then needs no gradient in any stage: affine GroupNorm would crash the process in backward."""
    case = HostCase("NCHW")
    model = incubating(case).to(memory_format=torch.channels_last)
    for part in ("stem", "norm"):
        model.host.get_submodule(part).requires_grad_(False)
    lead_to(model, "early", Stage.HOLDING, case.example(8).to(memory_format=torch.channels_last))
    model(case.example(8).to(memory_format=torch.channels_last)).sum().backward()
    assert all(p.grad is not None for _, p in model.owners()["early"])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_bfloat16_autocast(kit: Any, case: HostCase, operator: Operator) -> None:
    bare, model = case.build(), incubating(case, operator)
    optimizers = [kit.optimizers["adam"](module.parameters()) for module in (model, bare)]
    for inputs, target in data(case, bare)[:4]:
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (
                kit.train_step(module, steps, inputs, target) for module, steps in zip((model, bare), optimizers, strict=True)
            )
        assert kit.same(ours, theirs)
        assert_host_alone(kit, model, bare, optimizers)


def test_signed_zeros_and_non_finite_features_pass_to_the_bit(kit: Any) -> None:
    h = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, torch.inf, -torch.inf, torch.nan], requires_grad=True)
    for r in (torch.zeros(8), -torch.zeros(8), torch.full((8,), torch.inf), torch.full((8,), torch.nan)):
        assert kit.same(straight_through(h, r.requires_grad_(), 0.3), h.detach())


def test_output_in_eval_mode_and_without_gradients_is_the_hosts_own_tensor() -> None:
    model = incubating(HostCase("NC"))
    poison(model, "nan")
    inputs = HostCase("NC").example()
    assert bool(model.eval()(inputs).isfinite().all())
    with torch.no_grad():
        assert bool(model.train()(inputs).isfinite().all())
    slot = model.slot("early")
    feature = torch.ones(2, 8)
    with torch.no_grad():
        assert slot.on_output(model.host, (), feature) is None


def lengths(tensor: Tensor) -> Tensor:
    """The length of each row, shape (N, 1)."""
    return tensor.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("size", [0.01, 0.3, 0.59, 0.61, 5.0, 1e4])
def test_the_gradient_is_that_of_the_stated_loss(size: float) -> None:
    """Against autograd on <g, r> + |g| * phi(|r|) of each sample: quadratic up to twice the limit, linear beyond."""
    generator = torch.Generator().manual_seed(0)
    h, g, r = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    r = (r * size * lengths(h) / lengths(r)).requires_grad_()
    (straight_through(h, r, 0.3) * g).sum().backward()
    twin = r.detach().clone().requires_grad_()
    limit = 0.3 * lengths(h)
    phi = lengths(twin) ** 2 / (2 * limit) if size <= 0.6 else 2 * lengths(twin)
    ((g * twin).sum() + (lengths(g) * phi).sum()).backward()
    torch.testing.assert_close(r.grad, twin.grad, rtol=1e-9, atol=1e-12)
    assert r.grad is not None and float(r.grad.norm()) <= 3.0 * float(g.norm()) * (1 + 1e-12)


def test_the_residual_settles_at_ratio_times_the_feature_against_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    h, g = (torch.randn(6, 10, generator=generator) for _ in range(2))
    r = torch.zeros(6, 10, requires_grad=True)
    optimizer = torch.optim.SGD([r], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        (straight_through(h, r, 0.3) * g).sum().backward()
        optimizer.step()
    torch.testing.assert_close(r.detach(), -0.3 * lengths(h) * g / lengths(g), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_the_residual_of_a_real_seed_stays_near_its_limit(kit: Any, case: HostCase, scale: float) -> None:
    """A loss along a fixed direction would drive the residual out without end; ``scale`` of the loss must not matter."""
    model = case.model()
    model.germinate("early", BLUEPRINTS[case.layout])
    model.advance("early")
    seed = model.slot("early").seed
    assert seed is not None
    for parameter in model.host.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    sizes: list[float] = []
    features: list[Tensor] = []
    model.host.get_submodule("norm").register_forward_hook(lambda part, args, out: features.append(out.detach()), prepend=True)
    for _ in range(150):
        optimizer.zero_grad()
        (scale * model(case.example(num_samples=16)).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            sizes.append(float(seed(features[-1]).norm() / features[-1].norm()))
    ratio = LENIENT.incubation_ratio
    assert sizes[0] < ratio
    assert max(sizes) < 2 * ratio
    assert ratio / 4 < sizes[-1] < 1.5 * ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", [0.0, 1e-8])
def test_a_dead_feature_does_not_blow_up_its_seed(feature: float, dtype: torch.dtype) -> None:
    """|h| = 0 would make an unbounded pull infinite; the residual has to stay small and finite all the same."""
    h = torch.full((6, 10), feature, dtype=dtype)
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    r = torch.zeros(6, 10, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([r], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (straight_through(h, r, 0.3) * g).sum().backward()
        optimizer.step()
        assert float(r.detach().norm()) < 0.4 * float(g.norm())


def test_a_gradient_penalty_on_the_host_still_works(kit: Any) -> None:
    case = HostCase("NC")
    grads: list[dict[str, Tensor | None]] = []
    for module, host in ((bare := case.build(), bare), (model := incubating(case), model.host)):
        inputs = case.example().requires_grad_()
        (gradient,) = torch.autograd.grad(module(inputs).sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
        grads.append({name: p.grad for name, p in host.named_parameters()})
    assert kit.same(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_still_works(kit: Any, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = HostCase("NC").build()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    host = Checkpointed()
    host.inner.norm = nn.LayerNorm(8)  # BatchNorm would count a recomputed batch twice
    bare, inputs = copy.deepcopy(host), HostCase("NC").example().requires_grad_()
    model = GrowableModel(host, {"a": "inner.norm"}, inputs.detach(), config=LENIENT)
    model.germinate("a", "mlp")
    model.advance("a")
    for module in (bare, model):
        module(inputs).sum().backward()
    expected = {name: p.grad for name, p in bare.named_parameters()}
    assert kit.same({name: p.grad for name, p in model.host.named_parameters()}, expected)
    assert any(p.grad is not None and bool(p.grad.any()) for _, p in model.owners()["a"])


def test_germinated_and_cooling_slots_are_the_host_too(kit: Any) -> None:
    case = HostCase("NCHW")
    for stage in (Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
        bare, model = case.build(), case.model()
        model.germinate("early", "mlp")
        if stage is not Stage.GERMINATED:
            lead_to(model, "early", stage, case.example())
        for module in (bare, model):
            module(case.example()).square().mean().backward()
        expected = {name: p.grad for name, p in bare.named_parameters()}
        assert kit.same({name: p.grad for name, p in model.host.named_parameters()}, expected)
        assert kit.same(model.eval()(case.example()), bare.eval()(case.example()))
