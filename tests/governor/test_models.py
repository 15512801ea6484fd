"""Models of every kind: without parameters, frozen, tied, several optimizers, and ones that grow and shrink in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from morphogen.errors import StateMismatch
from morphogen.governor import Action, Governor, GovernorConfig
from morphogen.governor.detectors import NonFinite
from morphogen.growth import GrowableModel, Stage
from morphogen.state import TrainingState
from morphogen.testing import LENIENT, HostCase, lead_to

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=20)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_model_without_parameters_is_watched_by_its_loss(kit: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False))
    governor = Governor(TrainingState(model), CONFIG)
    for _ in range(100):
        assert governor.observe(model(noise(8, 4)).square().mean()).proceed
    before = kit.contents(model)
    for _ in range(2):
        model(noise(8, 4) * math.nan)
        assert governor.observe(math.nan).action is Action.SKIP
        assert kit.differences(kit.contents(model), before) == []
    model(noise(8, 4) * math.nan)
    verdict = governor.observe(math.nan)
    assert verdict.rollback is not None and verdict.rollback.parts == ("generators", "model")
    assert kit.is_finite(kit.contents(model))


def test_frozen_parameters_stay_frozen_and_the_same(kit: Any) -> None:
    model = kit.small_model()
    model[0].requires_grad_(False)
    loop = kit.Loop(CONFIG, model=model)
    before = model[0].weight.clone()
    loop.steps(115)
    loop.damage()
    verdict = loop.steps_until("rewind", 6)
    assert verdict.rollback.to_step == 89
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad
    assert all(verdict.proceed for verdict in loop.steps(20))


def test_tied_weights_stay_tied(kit: Any) -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10), nn.Linear(10, 5))
    model[2].weight = model[0].weight
    loop = kit.Loop(CONFIG, model=model)
    loop.steps(115)
    loop.damage()
    loop.steps_until("rewind", 6)
    assert model[2].weight is model[0].weight
    loop.state.verify()
    assert all(verdict.proceed for verdict in loop.steps(20))


def test_several_models_and_optimizers_are_one_run(kit: Any) -> None:
    """A fault in one takes all of them back, to one and the same moment."""
    actor, critic = kit.small_model(0), kit.small_model(1, batch_norm=True)
    optimizers = {
        "actor": torch.optim.Adam(actor.parameters(), lr=1e-3),
        "critic": torch.optim.SGD(critic.parameters(), lr=0.01, momentum=0.9),
    }
    state = TrainingState({"actor": actor, "critic": critic}, optimizers)
    governor = Governor(state, CONFIG)
    at: dict[int, Any] = {}
    for step in range(100):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        inputs = noise(16, 10, seed=step)
        loss = actor(inputs).square().mean() + critic(inputs).square().mean()
        if step == 99:
            critic[0].weight.data[0, 0] = math.nan
            loss = loss * math.nan
        loss.backward()
        verdict = governor.observe(loss.detach())
        at[step] = [kit.contents(actor, optimizers["actor"]), kit.contents(critic, optimizers["critic"])]
        if verdict.proceed:
            for optimizer in optimizers.values():
                optimizer.step()
    assert verdict.rollback is not None
    then = at[verdict.rollback.to_step]
    assert kit.differences(kit.contents(actor, optimizers["actor"]), then[0]) == []
    assert kit.differences(kit.contents(critic, optimizers["critic"]), then[1]) == []


def test_the_norm_is_that_of_all_optimizers(kit: Any) -> None:
    models = {name: nn.Linear(3, 1, bias=False) for name in ("one", "two")}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    governor = Governor(TrainingState(models, optimizers), CONFIG)
    for number, model in enumerate(models.values(), start=3):
        model.weight.grad = torch.zeros_like(model.weight)
        model.weight.grad[0, 0] = number
    governor.observe(1.0)
    models["two"].weight.grad[0, 1] = math.inf
    verdict = governor.observe(1.0)
    assert verdict.action is Action.SKIP and "gradient norm is inf" in verdict.reason
    assert governor._keeper.memory(0).detectors["explosion"]["log_norm"]["values"] == pytest.approx([math.log(5.0)])


def test_an_optimizer_that_is_replaced_by_nothing_is_no_fault(kit: Any) -> None:
    governor = Governor(TrainingState(kit.small_model()), CONFIG)
    assert all(governor.observe(1.0).proceed for _ in range(30))


class GrowingLoop:
    """A growable model under a governor; its features are 8 wide and its targets 3."""

    def __init__(self, layout: Any = "NC") -> None:
        self.case = HostCase(layout)
        self.model: GrowableModel = self.case.model(config=LENIENT)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.data = torch.Generator().manual_seed(1)
        self.state = TrainingState(self.model, self.optimizer, extras={"data": self.data})
        self.governor = Governor(self.state, CONFIG)
        self.at: dict[int, Any] = {}

    def step(self, kit: Any, poison: bool = False) -> Any:
        inputs = torch.randn(self.case.example(num_samples=16).shape, generator=self.data)
        if poison:
            next(self.model.parameters()).data.view(-1)[0] = math.nan
        targets = inputs.flatten(1)[:, :3].sin()
        self.optimizer.zero_grad()
        loss = functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        verdict = self.governor.observe(loss)
        self.at[verdict.step] = (kit.contents(self.model, self.optimizer), self.model.topology())
        if verdict.proceed:
            self.optimizer.step()
        return verdict

    def members(self) -> list[int]:
        return [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]

    def check(self, kit: Any, step: int) -> None:
        """The run is as it was at ``step``: structure, weights, moments; optimizer and owners agree."""
        then, topology = self.at[step]
        assert self.model.topology() == topology
        assert kit.differences(kit.contents(self.model, self.optimizer), then) == []
        owned = {id(parameter) for pairs in self.model.owners().values() for _, parameter in pairs}
        assert set(self.members()) == owned and len(self.members()) == len(owned)
        self.state.verify()


@pytest.mark.parametrize("layout", ["NC", "NCHW"])
def test_a_seed_younger_than_the_snapshot_is_gone_after_a_rewind(kit: Any, layout: Any) -> None:
    loop = GrowingLoop(layout)
    for _ in range(75):
        assert loop.step(kit).proceed
    host = loop.members()
    loop.model.germinate("early", "norm")
    for _ in range(5):
        loop.step(kit)
    assert len(loop.members()) > len(host)
    verdict = loop.step(kit, poison=True)
    assert verdict.rollback is not None and verdict.rollback.to_step == 49
    loop.check(kit, 49)
    assert loop.model.stages()["early"] is Stage.DORMANT and loop.members() == host
    loop.model.germinate("early", "norm")
    assert all(loop.step(kit).proceed for _ in range(30)), "and it can be germinated again"


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED])
def test_a_seed_pruned_after_the_snapshot_is_back_with_its_moments(kit: Any, stage: Stage) -> None:
    loop = GrowingLoop()
    loop.model.germinate("late", "low_rank")
    lead_to(loop.model, "late", stage, loop.case.example())
    for _ in range(75):
        assert loop.step(kit).proceed
    if stage is Stage.FOSSILIZED:
        loop.model.excise("late")
    else:
        loop.model.prune("late")
    assert loop.step(kit).proceed
    verdict = loop.step(kit, poison=True)
    assert verdict.rollback is not None
    loop.check(kit, verdict.rollback.to_step)
    assert loop.model.stages()["late"] is stage
    assert all(loop.step(kit).proceed for _ in range(10))


def test_a_fossil_made_after_the_snapshot_is_a_seed_again(kit: Any) -> None:
    loop = GrowingLoop()
    loop.model.germinate("late", "low_rank")
    lead_to(loop.model, "late", Stage.HOLDING, loop.case.example())
    for _ in range(75):
        loop.step(kit)
    loop.model.record_contribution("late", 1.0, 0.0)
    loop.model.sense()
    assert loop.model.fossilize("late").passed
    verdict = loop.step(kit, poison=True)
    assert verdict.rollback is not None
    loop.check(kit, verdict.rollback.to_step)
    assert loop.model.stages()["late"] is Stage.HOLDING


def test_growing_rewinding_and_growing_again_gives_the_same_bits(kit: Any) -> None:
    def run(rewinds: bool) -> Any:
        loop = GrowingLoop()
        for _ in range(75):
            loop.step(kit)
        if rewinds:
            loop.model.germinate("early", "low_rank")
            loop.step(kit, poison=True)
            loop.check(kit, 49)
        else:
            loop.state.restore(next(g.snapshot for g in loop.governor._keeper.ring.generations if g.step == 49))
        loop.model.germinate("early", "low_rank")
        loop.model.advance("early")
        for _ in range(20):
            assert loop.step(kit).proceed
        return kit.contents(loop.model, loop.optimizer)

    assert kit.differences(run(True), run(False)) == []


def test_events_change_no_result(kit: Any) -> None:
    """With somebody listening or not: the same bits, through skips, rewinds and a level shift."""
    results = []
    for emit in (True, False):
        loop = kit.Loop(CONFIG, emit=emit, model=kit.small_model(batch_norm=True, dropout=0.1))
        torch.manual_seed(0)
        loop.steps(100)
        loop.step(loss=kit.nan)
        loop.steps(9)
        loop.step(inputs=kit.nan)
        loop.steps(20)
        loop.damage()
        loop.steps(30)
        results.append((loop.contents(), [verdict.action for verdict in loop.verdicts], len(loop.events)))
    assert kit.differences(results[0][0], results[1][0]) == []
    assert results[0][1] == results[1][1] and results[1][2] == 0 < results[0][2]


def test_a_governor_over_a_healthy_run_changes_no_result(kit: Any) -> None:
    watched, free = kit.Loop(CONFIG), kit.Loop(CONFIG)
    free.governor.observe = lambda loss: Governor.observe(kit.Loop().governor, 1.0)
    watched.steps(60)
    free.steps(60)
    assert kit.differences(watched.contents(), free.contents()) == []


class Odd(nn.Module):
    """A small model with one tensor out of the ordinary."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


ODD: dict[str, Callable[[], Tensor]] = {
    "integers": lambda: torch.arange(3),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "bfloat16": lambda: torch.zeros(3, dtype=torch.bfloat16),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "empty": lambda: torch.zeros(0),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_odd_buffers_are_rewound_with_the_rest(kit: Any, kind: str) -> None:
    tensor = ODD[kind]()
    model = Odd(odd=tensor.clone())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    governor = Governor(TrainingState(model, optimizer), CONFIG)
    before = model.layer.weight.clone()
    model.layer.weight.data[0, 0] = math.nan
    model(noise(8, 4)).square().mean().backward()
    assert governor.observe(math.nan).rollback is not None
    assert torch.equal(model.layer.weight, before)
    after = model.odd.dequantize() if tensor.is_quantized else model.odd
    assert torch.equal(after, tensor.dequantize() if tensor.is_quantized else tensor)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Linear(4, 4, device="meta"), "`weight` must hold data, got a tensor on the meta device"),
        (lambda: nn.LazyLinear(4), "`weight` must hold data"),
        (lambda: Odd(odd=torch.eye(3).to_sparse()), "`odd` must be dense, got a tensor of layout torch.sparse_coo"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_cannot_be_rewound_is_refused(model: Any, said: str) -> None:
    with pytest.raises(StateMismatch, match=said):
        Governor(TrainingState(model()))


def test_complex_weights_are_watched(kit: Any) -> None:
    model = nn.Linear(4, 4, dtype=torch.complex64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    governor = Governor(TrainingState(model, optimizer), CONFIG)
    for number in range(3):
        loss = model(torch.complex(noise(8, 4, seed=number), noise(8, 4, seed=9 + number))).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert governor.observe(loss).proceed
        optimizer.step()
    model.weight.grad[0, 0] = math.nan
    assert governor.observe(loss).action is Action.SKIP


def test_two_detectors_of_one_name_are_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match="`detectors` must have names that differ"):
        kit.Loop(detectors=[NonFinite()])
