"""Faults to inject: each kind does what its row says and nothing else, and a schedule puts it where it was asked for."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from morphogen.governor import Action
from morphogen.governor.faults import ALIASES, FAMILIES, KINDS, Fault, Schedule, inject
from morphogen.state import TrainingState, draw_from

Contents = dict[str, Tensor]


@dataclasses.dataclass
class Seen:
    """One step from inside: what the first layer got, what the loss got, gradients, and everything before the update."""

    inputs: Tensor
    outputs: Tensor
    labels: Tensor
    gradients: Contents
    entered: Contents
    moved: float


class Run:
    """A small classifier with BatchNorm, trained for some steps with Adam."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] = lambda p: torch.optim.Adam(p, 1e-3)) -> None:
        with draw_from(torch.Generator().manual_seed(0)):
            self.model = nn.Sequential(
                nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
            )
        self.optimizer = optimizer(self.model.parameters())
        self.data = torch.Generator().manual_seed(1)
        self.state = TrainingState(self.model, self.optimizer, extras={"data": self.data})
        for _ in range(5):
            self.step()

    def step(self, labels_of: Callable[[Tensor], Tensor] = lambda labels: labels) -> Seen:
        inputs = torch.randn(16, 6, generator=self.data)
        labels = labels_of(torch.randint(4, (16,), generator=self.data))
        entered, got = self.contents(), list[Tensor]()
        with self.model[0].register_forward_pre_hook(lambda module, given: got.append(given[0])):
            outputs = self.model(inputs)
        self.optimizer.zero_grad()
        functional.cross_entropy(outputs, labels).backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        before = self.contents()
        self.optimizer.step()
        moved = max(float((p.detach() - before[name]).abs().max()) for name, p in self.model.named_parameters())
        return Seen(got[0], outputs.detach(), labels, gradients, entered, moved)

    def contents(self) -> Contents:
        """Parameters, buffers and moments."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        kept = {name: tensor.detach().clone() for name, tensor in named.items()}
        for name, parameter in self.model.named_parameters():
            kept |= {f"{name}: {key}": value.clone() for key, value in self.optimizer.state.get(parameter, {}).items()}
        return kept

    def hooks(self) -> int:
        """How many hooks there are anywhere."""
        tables = [vars(module)[name] for module in self.model.modules() for name in vars(module) if name.endswith("_hooks")]
        tables += [parameter._backward_hooks or {} for parameter in self.model.parameters()]
        tables += [self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks]
        return sum(len(table) for table in tables)


def changed(seen: Seen, calm: Seen) -> set[str]:
    """Names of what differs on entry into the step."""
    return {name for name, value in seen.entered.items() if not torch.equal(value, calm.entered[name])}


def gradients_are(seen: Seen, calm: Seen, factor: float) -> bool:
    return all(torch.allclose(value, factor * calm.gradients[name]) for name, value in seen.gradients.items())


def relative_noise(seen: Seen, calm: Seen) -> float:
    """The median over weights of |w - w'| / |w'|."""
    names = [name for name in seen.entered if name.endswith("weight")]
    moved = [(seen.entered[n] - calm.entered[n]).norm() / calm.entered[n].norm() for n in names]
    return float(torch.stack(moved).median())


HEAD = {"5.weight", "5.bias"}
WEIGHTS = {f"{layer}.{kind}" for layer in (0, 1, 3, 5) for kind in ("weight", "bias")}
Check = Callable[[Seen, Seen], bool]
EFFECTS: dict[str, Check] = {
    "nan_input": lambda s, c: bool(s.inputs.isnan().all()),
    "inf_input": lambda s, c: bool(s.inputs.isposinf().all()),
    "nan_output": lambda s, c: bool(s.outputs.isnan().all()) and any(bool(g.isnan().any()) for g in s.gradients.values()),
    "half_overflow": lambda s, c: bool(s.outputs.isinf().any()) and bool(s.outputs.isfinite().any()),
    "nan_gradient": lambda s, c: [bool(g.isnan().all()) for g in s.gradients.values()].count(True) == 1,
    "inf_gradient": lambda s, c: sum(int(g.isinf().sum()) for g in s.gradients.values()) == 1,
    "half_gradient": lambda s, c: all(bool(s.gradients[n].isinf().any()) for n in HEAD),
    "exponent_flip": lambda s, c: len(changed(s, c)) == 1 and differing(s, c) == 1 and largest_ratio(s, c) > 1e30,
    "nan_weight": lambda s, c: changed(s, c) == {"5.weight"} and int(s.entered["5.weight"].isnan().sum()) == 1,
    "bad_batch": lambda s, c: torch.allclose(s.inputs, 30 * c.inputs),
    "noise_batch": lambda s, c: 5 < float(s.inputs.std() / c.inputs.std()) < 20 and not torch.allclose(s.inputs, c.inputs),
    "output_scale": lambda s, c: torch.allclose(s.outputs, 30 * c.outputs),
    "weight_noise": lambda s, c: changed(s, c) == WEIGHTS and 2 < relative_noise(s, c) < 4,
    "layer_scale": lambda s, c: len(changed(s, c)) == 1 and abs(largest_ratio(s, c) - 10) < 1e-3,
    "gradient_scale": lambda s, c: gradients_are(s, c, 1e4),
    "gradient_noise": lambda s, c: 50 < gradient_distance(s, c) < 200,
    "lr_spike": lambda s, c: abs(s.moved / c.moved - 100) < 1,
    "lr_high": lambda s, c: abs(s.moved / c.moved - 20) < 0.2,
    "second_moment_zero": lambda s, c: only(s, c, "exp_avg_sq") and largest_ratio(s, c) == 0,
    "second_moment_scale": lambda s, c: only(s, c, "exp_avg_sq") and s.moved > 3 * c.moved,
    "momentum_scale": lambda s, c: only(s, c, "exp_avg") and largest_ratio(s, c) == pytest.approx(100),
    "weight_growth": lambda s, c: changed(s, c) == WEIGHTS and largest_ratio(s, c) == pytest.approx(1.05),
    "weight_drift": lambda s, c: changed(s, c) == WEIGHTS and 0.07 < relative_noise(s, c) < 0.14,
    "sign_flip": lambda s, c: gradients_are(s, c, -1),
    "head_zero": lambda s, c: changed(s, c) == HEAD and not s.outputs.any(),
    "head_bias": lambda s, c: changed(s, c) == {"5.bias"} and len(s.outputs.argmax(dim=1).unique()) == 1,
    "dead_units": lambda s, c: dead_rows(s, "0.weight") == 11 and dead_rows(s, "3.weight") == 9 and not changed(s, c) & HEAD,
    "head_decay": lambda s, c: changed(s, c) == HEAD and torch.allclose(s.outputs, 0.9 * c.outputs),
    "weight_shrink": lambda s, c: changed(s, c) == WEIGHTS and largest_ratio(s, c) == pytest.approx(0.95),
    "label_shuffle": lambda s, c: not torch.equal(s.labels, c.labels) and torch.equal(s.labels.msort(), c.labels.msort()),
    "label_constant": lambda s, c: len(s.labels.unique()) == 1 and s.labels[0] == c.labels[0] and len(c.labels.unique()) > 1,
    "blank_input": lambda s, c: not s.inputs.any(),
    "no_gradient": lambda s, c: set(s.gradients) == set(c.gradients) and not any(g.any() for g in s.gradients.values()),
    "frozen_body": lambda s, c: {name for name, g in s.gradients.items() if bool(g.any())} == HEAD,
    "buffers_poisoned": lambda s, c: changed(s, c) == {"1.running_mean", "1.running_var"} and torch.equal(s.outputs, c.outputs),
    "buffers_drift": lambda s, c: changed(s, c) == {"1.running_var"} and largest_ratio(s, c) == pytest.approx(1.5),
    "buffers_shrunk": lambda s, c: changed(s, c) == {"1.running_var"} and largest_ratio(s, c) == pytest.approx(0.5),
    "buffers_nan": lambda s, c: bool(s.entered["1.running_var"].isnan().all()) and torch.equal(s.outputs, c.outputs),
}  # fmt: skip


def differing(seen: Seen, calm: Seen) -> int:
    return sum(int((value != calm.entered[name]).sum()) for name, value in seen.entered.items())


def largest_ratio(seen: Seen, calm: Seen) -> float:
    found = [(seen.entered[name] / calm.entered[name]).nan_to_num(0.0, math.inf) for name in changed(seen, calm)]
    return max(float(ratio.abs().max()) for ratio in found)


def only(seen: Seen, calm: Seen, moment: str) -> bool:
    names = changed(seen, calm)
    return bool(names) and all(name.endswith(f": {moment}") for name in names)


def dead_rows(seen: Seen, name: str) -> int:
    return int((~seen.entered[name].any(dim=1)).sum())


def gradient_distance(seen: Seen, calm: Seen) -> float:
    noisy, clean = seen.gradients["0.weight"], calm.gradients["0.weight"]
    return float((noisy - clean).norm() / clean.norm())


@pytest.fixture(autouse=True)
def global_chance() -> Iterator[None]:
    """No fault draws from the global generator, and none leaves it otherwise than it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def with_fault(kind: str, run: Run, seed: int = 3) -> Seen:
    with inject(kind, run.state, generator=torch.Generator().manual_seed(seed)) as fault:
        return run.step(fault.labels)


def test_every_kind_is_in_the_table_and_described() -> None:
    assert set(EFFECTS) == set(KINDS) and len(KINDS) >= 20
    assert {kind.family for kind in KINDS.values()} == set(FAMILIES)
    assert all(len(kind.description) > 15 and kind.steps >= 1 for kind in KINDS.values())
    assert all(name in KINDS for name in ALIASES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_does_what_its_row_says_and_leaves_no_hook(kind: str) -> None:
    run, calm_run = Run(), Run()
    hooks, rate = run.hooks(), run.optimizer.param_groups[0]["lr"]
    seen, calm = with_fault(kind, run), calm_run.step()
    assert EFFECTS[kind](seen, calm)
    assert run.hooks() == hooks == 0 and run.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    entered = changed(seen, calm)
    in_place = KINDS[kind].through in ("weights", "buffers", "moments")
    assert bool(entered) == in_place, "what is not damaged for good is left as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_after_is_an_ordinary_one(kind: str) -> None:
    run, calm_run = Run(), Run()
    snapshot = run.state.capture()
    with_fault(kind, run)
    run.state.restore(snapshot)
    first, second = run.step(), calm_run.step()
    assert torch.equal(first.outputs, second.outputs) and gradients_are(first, second, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_generators_give_equal_faults(kind: str, kit: Any) -> None:
    left, right = Run(), Run()
    with_fault(kind, left), with_fault(kind, right)
    assert kit.differences(left.contents(), right.contents()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_the_block_leaves_no_hook_either(kind: str) -> None:
    run = Run()
    with pytest.raises(KeyError, match="the loop's own"), inject(kind, run.state, generator=torch.Generator()):
        raise KeyError("the loop's own")
    assert run.hooks() == 0


def test_kinds_that_do_not_fit_the_run_say_so() -> None:
    with draw_from(torch.Generator().manual_seed(0)):
        plain, tokens = nn.Sequential(nn.Linear(3, 3, bias=False)), nn.Embedding(2, 2)
    fresh = TrainingState(plain, torch.optim.SGD(plain.parameters(), 0.1))
    stepped = Run(lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9))
    cases = {
        "buffers_poisoned": (fresh, "buffers"), "buffers_nan": (fresh, "buffers"), "head_bias": (fresh, "bias"),
        "dead_units": (fresh, "hidden layer"), "momentum_scale": (fresh, "first moments"),
        "second_moment_zero": (stepped.state, "second moments"), "lr_spike": (TrainingState(plain), "an optimizer"),
        "head_zero": (TrainingState(tokens), "linear or convolution layers"),
        "no_gradient": (TrainingState(nn.ReLU()), "trainable parameters"),
    }  # fmt: skip
    for kind, (state, what) in cases.items():
        with pytest.raises(ValueError, match=f"must fit the run.*{what}"), inject(kind, state, generator=torch.Generator()):
            raise AssertionError("the block must not start")
    assert stepped.hooks() == 0


@pytest.mark.parametrize("kind", ["nan_input", "nan_output", "no_gradient", "label_shuffle"])
def test_a_fault_that_met_nothing_is_not_passed_over_in_silence(kind: str) -> None:
    run = Run()
    with pytest.raises(ValueError, match="had no effect"), inject(kind, run.state, generator=torch.Generator()):
        pass
    assert run.hooks() == 0


def test_misuse_is_refused() -> None:
    state = Run().state
    for arguments, message in (
        (("flood", {}), "`kind` must be one of nan, spike, nan_input"),
        (("bad_batch", {"strength": math.nan}), "`strength` must be finite"),
        (("weight_noise", {}), "`generator` must be given for weight_noise"),
    ):
        with pytest.raises(ValueError, match=message), inject(arguments[0], state, **arguments[1]):
            pass


def test_strength_is_the_callers_choice() -> None:
    run, calm_run = Run(), Run()
    with inject("bad_batch", run.state, strength=-2.0):
        seen = run.step()
    assert torch.allclose(seen.inputs, -2.0 * calm_run.step().inputs)


Point = collections.namedtuple("Point", ["x", "y"])


class Wrapping(nn.Module):
    """Takes tokens, and gives back tensors in containers."""

    def __init__(self) -> None:
        super().__init__()
        with draw_from(torch.Generator().manual_seed(0)):
            self.tokens, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        hidden = self.head(self.tokens(tokens)) * (1.0 if scale is None else scale)
        return {"logits": hidden, "point": Point(hidden, [tokens]), "count": 3}


def test_tokens_are_poisoned_behind_their_embedding_and_outputs_inside_containers() -> None:
    model, tokens = Wrapping(), torch.tensor([[1, 2]])
    state = TrainingState(model)
    with inject("nan_input", state):
        assert model(tokens)["logits"].isnan().all()
    with inject("nan_input", state):  # where there is a floating-point input, it is that
        found = model(tokens, scale=torch.ones(()))["logits"]
        assert found.isnan().all()
        found.sum().backward()
        assert model.tokens.weight.grad is not None and model.tokens.weight.grad.isnan().any()
    with inject("output_scale", state, strength=2.0):
        made = model(tokens)
    calm = model(tokens)
    assert torch.equal(made["logits"], 2 * calm["logits"]) and made["count"] == 3
    assert isinstance(made["point"], Point) and torch.equal(made["point"].x, 2 * calm["logits"])
    assert torch.equal(made["point"].y[0], tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_an_exponent_bit_flips_in_every_precision(dtype: torch.dtype) -> None:
    with draw_from(torch.Generator().manual_seed(0)):
        model = nn.Linear(4, 4, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(0.5)
    with inject("exponent_flip", TrainingState(model), generator=torch.Generator().manual_seed(0)):
        pass
    weights = model.weight.detach().double().flatten().sort().values
    assert bool((weights[:-1] == 0.5).all()) and float(weights[-1]) > 1e4


@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 50), lambda o: LambdaLR(o, lambda step: 0.9**step)])
def test_a_rate_is_high_for_the_update_alone_whatever_the_schedule_or_a_rewind_does(schedule: Any) -> None:
    rates: list[list[float]] = []
    for kind in ("lr_spike", None):
        run = Run()
        scheduler = schedule(run.optimizer)
        state = TrainingState(run.model, run.optimizer, scheduler)
        snapshot, found = state.capture(), list[float]()
        for step in range(6):
            with Schedule([Fault(0, kind)] if kind else [], state).at(step):
                run.step()
                scheduler.step()
                if step == 3:
                    state.restore(snapshot)
            found.append(run.optimizer.param_groups[0]["lr"])
        rates.append(found)
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_a_rate_is_as_before_after_an_update_that_failed() -> None:
    run = Run()

    def closure() -> float:
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
        raise KeyError("no loss")

    with pytest.raises(KeyError, match="no loss"), inject("lr_spike", run.state):
        run.optimizer.step(closure)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3) and run.hooks() == 0


# -- faults by name and step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nan@300", "spike@0", "nan_input@7", "label_shuffle@300+40", "lr_high@1+1"])
def test_a_fault_is_written_as_kind_at_step(text: str) -> None:
    assert str(Fault.parse(text)) == text


def test_faults_have_an_order_and_their_kinds_duration() -> None:
    assert Fault.parse("nan@300") == Fault(300, "nan") and Fault(3, "label_shuffle").duration_steps == 40
    assert sorted([Fault(9, "nan"), Fault(2, "spike")]) == [Fault(2, "spike"), Fault(9, "nan")]
    assert [step for step in range(9) if Fault(3, "nan", steps=2).is_at_work(step)] == [3, 4]


@pytest.mark.parametrize(
    "text",
    ["nan", "nan@", "@3", "nan@-1", "nan@1.5", "nan@3@4", "NaN@3", "flood@3", "", "nan@ 3", "nan@3+", "nan@3+0", "nan@+3"],
)
def test_what_is_written_otherwise_is_refused_with_the_form_and_the_kinds(text: str) -> None:
    with pytest.raises(ValueError, match=r"a fault must be written as KIND@STEP or KIND@STEP\+STEPS, .*nan@STEP.*weight_noise"):
        Fault.parse(text)


@pytest.mark.parametrize("fields", [{"step": -1}, {"kind": "flood"}, {"steps": 0}, {"strength": math.inf}])
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be"):
        Fault(**{"step": 1, "kind": "nan", **fields})


def test_a_schedule_hits_its_steps_once_and_several_faults_may_meet() -> None:
    run = Run()
    schedule = Schedule(["label_constant@2+3", Fault(3, "bad_batch", strength=5.0)], run.state)
    steps = [0, 1, 2, 3, 2, 3, 4, 5]  # a rewind after step 3 brings 2 and 3 back
    hit: list[tuple[bool, bool]] = []
    for step in steps:
        with schedule.at(step) as fault:
            seen = run.step(fault.labels)
        hit.append((len(seen.labels.unique()) == 1, float(seen.inputs.std()) > 3))
    assert [labels for labels, _ in hit] == [False, False, True, True, False, False, True, False]
    assert [inputs for _, inputs in hit] == [False, False, False, True, False, False, False, False]
    recurring = Schedule(["label_constant@2+3"], run.state, recurring=True)
    assert [bool(recurring.due(step)) for step in steps] == [2 <= step < 5 for step in steps]


def test_a_schedule_that_fails_half_way_leaves_no_hook() -> None:
    run = Run()
    schedule = Schedule(["bad_batch@0", "weight_noise@0"], run.state)
    with pytest.raises(ValueError, match="`generator` must be given"), schedule.at(0):
        pass
    assert run.hooks() == 0


def test_a_governor_recovers_from_each_of_the_two_with_short_names(kit: Any) -> None:
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(130)
    with inject("nan", loop.state):
        assert loop.step().action is not Action.PROCEED
    loop.steps(60)
    with inject("spike", loop.state, generator=torch.Generator().manual_seed(3)):
        loop.step()
    loop.steps(8)
    assert loop.rollbacks, "damaged weights need a rewind, at once or soon"
    assert all(verdict.proceed for verdict in loop.steps(40))
    assert kit.is_finite(loop.contents())
