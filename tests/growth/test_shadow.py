"""Shadow passes: the seeds learn from what they would do, and nothing else notices, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, GrowthConfig, GrowthPoint, Sowing, Stage
from morphogen.growth.lifecycle import OPERATORS, Operator
from morphogen.state import draw_from
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

SHADOW = LENIENT.replace(incubator="shadow")
BLUEPRINTS = {"NC": "mlp", "NCL": "conv1d", "NLC": "low_rank", "NCHW": "conv3x3"}
STEPS = 6


class Tail(nn.Module):
    """A host with dropout, in front of and behind its growth point, and BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3))
        self.middle = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


def tail() -> Tail:
    with draw_from(torch.Generator().manual_seed(0)):
        return Tail()


def incubating(
    host: nn.Module, points: Mapping[str, str | GrowthPoint], example: Tensor, sowing: Sowing, config: GrowthConfig = SHADOW
) -> GrowableModel:
    """A model with a seed in incubation in each slot."""
    model = GrowableModel(host, points, example, config=config)
    for slot in points:
        model.germinate(slot, sowing)
        model.advance(slot)
    return model


def grown(case: HostCase, operator: Operator = "add", **sowing: Any) -> GrowableModel:
    """A model over ``case`` that incubates a seed in both slots."""
    seed = Sowing(blueprint=BLUEPRINTS[case.layout], operator=operator, **sowing)
    return incubating(case.build(), case.points, case.example(), seed)


def stirred(model: GrowableModel) -> GrowableModel:
    """Give all seeds weights that matter."""
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def data(example: Tensor, host: nn.Module, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = copy.deepcopy(host).eval()(example).shape
    return [(torch.randn(example.shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(steps)]


def loss_of(module: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    return (module(inputs) - target).square().mean()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, target: Tensor) -> Tensor:
    """Take one step as a user would, and return the loss."""
    optimizer.zero_grad()
    loss = loss_of(module, inputs, target)
    loss.backward()
    if isinstance(module, GrowableModel) and module.needs_shadow:
        with module.shadow():
            loss_of(module, inputs, target).backward()
    optimizer.step()
    return loss.detach()


def gradients(model: GrowableModel, slot: str) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.owners()[slot]}


def notices(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a pass might touch."""
    return {
        "tensors": {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())},
        "identity": {name: id(t) for name, t in (*module.named_parameters(), *module.named_buffers())},
        "versions": {name: t._version for name, t in module.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in module.named_parameters()},
        "hooks": {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in module.named_modules()},
        "modes": {name: part.training for name, part in module.named_modules()},
    }


def assert_same_training(kit: Any, bare: nn.Module, model: GrowableModel, example: Tensor, autocast: bool = False) -> None:
    """Train both on the same data, each step from the same global generators; weights, buffers, gradients, moments agree."""
    optimizers = [kit.optimizers["adam"](module.parameters()) for module in (bare, model)]
    seeds = copy.deepcopy(model.slots.state_dict())
    for inputs, target in data(example, bare):
        states, losses = [torch.get_rng_state()] * 2, list[Tensor]()
        for module, optimizer in zip((bare, model), optimizers, strict=True):
            torch.set_rng_state(states[0])
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses.append(train(module, optimizer, inputs, target))
            states.append(kit.chance())
        assert kit.same(losses[0], losses[1]) and kit.same(states[-1], states[-2])
        theirs, ours = dict(bare.named_parameters()), dict(model.host.named_parameters())
        assert kit.same(model.host.state_dict(), bare.state_dict())
        assert kit.same({n: p.grad for n, p in ours.items()}, {n: p.grad for n, p in theirs.items()})
        moments = [opt.state for opt in optimizers]
        assert kit.same({n: moments[1][p] for n, p in ours.items()}, {n: moments[0][p] for n, p in theirs.items()})
    moved = [name for name, tensor in model.slots.state_dict().items() if not torch.equal(tensor, seeds[name])]
    assert set(moved) == set(seeds), "every parameter of the seeds learns meanwhile"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_training_is_bit_identical_to_training_without_seeds(kit: Any, case: HostCase, operator: Operator) -> None:
    assert_same_training(kit, case.build(), grown(case, operator), case.example(8))


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_draws_for_the_host_what_it_draws_without_seeds(kit: Any, autocast: bool) -> None:
    example = HostCase("NC").example(num_samples=8)
    model = incubating(tail(), {"a": "stem", "b": "middle"}, example, Sowing(blueprint="mlp"))
    assert_same_training(kit, tail(), model, example, autocast)


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_bfloat16_autocast(kit: Any, case: HostCase) -> None:
    assert_same_training(kit, case.build(), grown(case), case.example(8), autocast=True)


class Recurrent(nn.Module):
    """A host whose growth point returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def test_the_feature_may_lie_in_a_tuple(kit: Any) -> None:
    example = HostCase("NLC").example(num_samples=8)
    with draw_from(torch.Generator().manual_seed(0)):
        bare = Recurrent()
    points = {"a": GrowthPoint("lstm", layout="NLC", output=0)}
    assert_same_training(kit, bare, incubating(copy.deepcopy(bare), points, example, Sowing(blueprint="mlp")), example)


def test_an_ordinary_pass_computes_no_seed(kit: Any) -> None:
    model = grown(HostCase("NCHW"))
    calls: list[str] = []
    for slot in model.stages():
        seed = model.slot(slot).seed
        assert seed is not None
        seed.register_forward_hook(lambda *_: calls.append("seed"))
    feature = torch.ones(2, 8, 3, 3)
    assert model.slot("early").on_output(model.host, (), feature) is None
    model(HostCase("NCHW").example()).sum().backward()
    assert calls == [] and all(g is None for slot in model.stages() for g in gradients(model, slot).values())
    with model.shadow():
        model(HostCase("NCHW").example()).sum().backward()
    assert calls == ["seed", "seed"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradient_is_the_one_written_out(operator: Operator) -> None:
    """y = W2 (h + a r(h)) + b2 with h = tanh(W1 x + b1) and the loss |y - t|^2 / N, so dL/dr = 2 a / N (y - t) W2."""
    with draw_from(torch.Generator().manual_seed(0)):
        host = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    host.double()
    x, t = (torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 3))
    sowing = Sowing(blueprint="mlp", operator=operator, alpha_target=0.6)
    model = stirred(incubating(host, {"a": "1"}, x, sowing))
    with model.shadow():
        ((model(x) - t).square().sum() / 5).backward()
    seed = model.slot("a").seed
    assert seed is not None
    w1, b1, w2, b2 = (parameter.detach() for parameter in host.parameters())
    h = torch.tanh(x @ w1.T + b1)
    r = seed(h)
    y = (h + 0.6 * r.detach()) @ w2.T + b2
    found = [parameter.grad for parameter in seed.parameters()]
    expected = torch.autograd.grad(r, list(seed.parameters()), grad_outputs=2 * 0.6 / 5 * (y - t) @ w2)
    torch.testing.assert_close(found, list(expected), rtol=1e-10, atol=1e-14)
    assert all(bool(gradient.any()) for gradient in expected)


def test_seeds_in_one_pass_see_each_other_act() -> None:
    """The second one's feature holds the first one's residual; what the first one gets comes along the host alone."""
    with draw_from(torch.Generator().manual_seed(0)):
        host = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    x, t = (torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 3))
    model = stirred(incubating(host, {"a": "0", "b": "1"}, x, Sowing(blueprint="mlp")))
    with model.shadow():
        ((model(x) - t).square().sum() / 5).backward()
    first, second = (model.slot(name).seed for name in "ab")
    assert first is not None and second is not None
    h1 = host[0](x).detach()
    r1 = first(h1)
    h2 = host[1](h1 + r1).detach()
    r2 = second(h2)
    g2 = 2 / 5 * (host[2](h2 + r2).detach() - t) @ host[2].weight.detach()
    for seed, r, g in ((second, r2, g2), (first, r1, g2 @ host[1].weight.detach())):
        expected = torch.autograd.grad(r, list(seed.parameters()), grad_outputs=g)
        torch.testing.assert_close([p.grad for p in seed.parameters()], list(expected), rtol=1e-10, atol=1e-14)


def test_the_pass_shows_what_blending_does() -> None:
    case = HostCase("NCHW")
    model, x = stirred(grown(case, alpha_target=0.7)).eval(), case.example()
    with torch.no_grad(), model.shadow():
        shown = model(x)
    model.train()
    for slot in model.stages():
        with model.shadow():
            model(x).sum().backward()
        model.sense()
        assert model.advance(slot)
        model.set_alpha_target(slot, 0.7, over=0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), shown)


@pytest.mark.parametrize("training", [True, False])
def test_a_pending_graph_can_still_be_walked(kit: Any, training: bool) -> None:
    """In eval mode BatchNorm saves its statistics for the way back: they must not be written to in between."""
    case = HostCase("NCHW")
    bare, model = case.build().train(training), grown(case).train(training)
    inputs = case.example()
    loss = model(inputs).square().mean()
    with model.shadow():
        model(inputs).square().mean().backward()
    loss.backward()
    bare(inputs).square().mean().backward()
    assert kit.same({n: p.grad for n, p in model.host.named_parameters()}, {n: p.grad for n, p in bare.named_parameters()})


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
@pytest.mark.parametrize("slots", [("early", "late"), ("late", "early")], ids="-".join)
def test_acting_seeds_are_constants(kit: Any, stage: Stage, slots: tuple[str, str]) -> None:
    case, (acting, learning) = HostCase("NCHW"), slots
    model = case.model(config=SHADOW)
    model.germinate(acting, "conv3x3")
    lead_to(model, acting, stage, case.example())
    model.germinate(learning, "conv3x3")
    model.advance(learning)
    stirred(model)
    model(case.example()).square().mean().backward()
    before = {"host": notices(model.host), acting: notices(model.slot(acting))}
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients(model, acting).values())
    with model.shadow():
        model(case.example()).square().mean().backward()
    assert kit.same({"host": notices(model.host), acting: notices(model.slot(acting))}, before)
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients(model, learning).values())


def test_inputs_and_what_computed_them_get_no_gradient() -> None:
    model, inputs = stirred(grown(HostCase("NC"))), HostCase("NC").example().requires_grad_()
    stem = nn.Linear(6, 6)
    with model.shadow():
        model(stem(inputs)).sum().backward()
        model(inputs).sum().backward()
    assert inputs.grad is None and stem.weight.grad is None


def test_gradients_accumulate_over_micro_batches() -> None:
    case = HostCase("NLC")
    model, twin = stirred(grown(case)), stirred(grown(case))
    parts = case.example(num_samples=6).chunk(2)
    for part in parts:
        model(part).sum().backward()
        with model.shadow():
            model(part).sum().backward()
    with twin.shadow():
        for part in parts:
            twin(part).sum().backward()
    for slot in model.stages():
        torch.testing.assert_close(gradients(model, slot), gradients(twin, slot))


def test_a_frozen_parameter_stays_frozen_and_a_failing_pass_leaves_no_trace(kit: Any) -> None:
    model = grown(HostCase("NCHW"))
    model.host.get_submodule("stem").requires_grad_(False)
    before, chance = notices(model), kit.chance()
    with pytest.raises(KeyError, match="mine"), model.shadow():
        model(HostCase("NCHW").example())
        raise KeyError("mine")
    assert kit.same(notices(model), before) and kit.same(kit.chance(), chance)
    with model.shadow():
        pass


def test_a_buffer_that_is_replaced_is_the_old_one_again(kit: Any) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    with draw_from(torch.Generator().manual_seed(0)):
        host = nn.Sequential(nn.Linear(6, 8), Counting(), nn.Linear(8, 3))
    model = incubating(host, {"a": "0"}, HostCase("NC").example(), Sowing(blueprint="mlp"))
    before = notices(model.host)
    with model.shadow():
        model(HostCase("NC").example()).sum().backward()
        model(HostCase("NC").example()).sum().backward()
    assert kit.same(notices(model.host), before)


def test_a_seed_keeps_its_own_buffers_up_to_date() -> None:
    model = grown(HostCase("NC"))
    seed = model.slot("early").seed
    assert seed is not None
    with draw_from(torch.Generator().manual_seed(0)):
        seed.body = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    with model.shadow():
        model(HostCase("NC").example()).sum().backward()
    assert int(dict(seed.named_buffers())["body.0.num_batches_tracked"]) == 1


# -- chance -----------------------------------------------------------------------------------------------------------------


def outputs_in_shadow(model: GrowableModel, passes: int) -> list[Tensor]:
    found: list[Tensor] = []
    for _ in range(passes):
        with model.shadow(), torch.no_grad():
            found.append(model(torch.ones(4, 6)))
    return found


def test_dropout_draws_from_a_stream_of_the_pass() -> None:
    """Every pass draws anew, and the same run draws the same."""
    model = incubating(tail(), {"a": "stem"}, torch.ones(4, 6), Sowing(blueprint="mlp"))
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    first, second = outputs_in_shadow(model, 2), outputs_in_shadow(twin, 2)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and not torch.equal(first[0], first[1])
    with torch.no_grad():
        ordinary = model(torch.ones(4, 6))
    after = outputs_in_shadow(model, 1)
    torch.set_rng_state(state)
    assert not torch.equal(ordinary, first[0]), "the pass must not draw what the next ordinary one will draw"
    assert not torch.equal(after[0], first[0]), "where the host draws, each of its passes makes another stream"
    fresh = copy.deepcopy(twin)
    with torch.no_grad():
        fresh(torch.ones(4, 6))
    assert torch.equal(outputs_in_shadow(fresh, 1)[0], after[0]), "a continued run draws the same again"
    torch.set_rng_state(state)


def test_hooks_of_others_run() -> None:
    model, calls = grown(HostCase("NC")), list[bool]()
    model.host.get_submodule("head").register_forward_hook(lambda module, args, out: calls.append(args[0].requires_grad))
    with model.shadow():
        model(HostCase("NC").example())
    assert calls == [True]


@pytest.mark.parametrize("operator", OPERATORS)
def test_channels_last(operator: Operator) -> None:
    case = HostCase("NCHW")
    model, twin = (stirred(grown(case, operator)) for _ in range(2))
    twin.to(memory_format=torch.channels_last)
    for module, inputs in ((model, case.example(8)), (twin, case.example(8).to(memory_format=torch.channels_last))):
        with module.shadow():
            module(inputs).square().mean().backward()
    for slot in model.stages():
        torch.testing.assert_close(gradients(model, slot), gradients(twin, slot), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    """What is computed again on the way back is the shadow pass, with the same dropout."""

    class Checkpointed(nn.Module):
        def __init__(self, checkpoint: bool) -> None:
            super().__init__()
            with draw_from(torch.Generator().manual_seed(0)):
                self.stem = nn.Linear(6, 8)
                self.tail = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
            self.checkpoint = checkpoint

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return torch.utils.checkpoint.checkpoint(self.tail, h, use_reentrant=reentrant) if self.checkpoint else self.tail(h)

    found: list[dict[str, Tensor | None]] = []
    for checkpoint in (True, False):
        points = {"a": "stem", "b": "tail.1"}
        model = incubating(Checkpointed(checkpoint), points, HostCase("NC").example(), Sowing(blueprint="mlp"))
        stirred(model)
        with model.shadow():
            model(HostCase("NC").example()).square().sum().backward()
        found.append({**gradients(model, "a"), **gradients(model, "b")})
    assert all(gradient is not None and bool(gradient.any()) for gradient in found[0].values())
    torch.testing.assert_close(found[0], found[1])
