"""New hidden units are built as told from the layers that are there, and what does not fit is refused without a trace."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.errors import SlotError, StateMismatch
from morphogen.growth import GrowableModel, GrowthConfig, Sowing, Stage, blueprints
from morphogen.growth.blueprints.widen import gradmax_directions
from morphogen.growth.layouts import LAYOUTS
from morphogen.state import draw_from
from morphogen.telemetry.events import Emit, discard
from morphogen.testing import LENIENT, lead_to

SHAPES = {"NC": (5, 4), "NLC": (5, 6, 4), "NCL": (5, 4, 8), "NCHW": (5, 4, 8, 8)}
UNITS = 4


class Mlp(nn.Module):
    """Named layers; the nonlinearity is a function or a module."""

    def __init__(self, module: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.act = nn.GELU() if module else None
        self.fc2 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(F.gelu(hidden) if self.act is None else self.act(hidden))


PAIRS: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), {}),
    "no bias": ("NLC", lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)), {}),
    "batch norm": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5)), {}),
    "conv2d": (
        "NCHW",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)),
        {},
    ),
    "group norm": ("NCL", lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv1d(6, 5, 1)), {}),
    "mlp, module": ("NLC", Mlp, {"first": "fc1", "second": "fc2", "activation": "act"}),
    "mlp, function": ("NC", lambda: Mlp(False), {"first": "fc1", "second": "fc2", "activation": "gelu"}),
}


class Host(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.pair(x), inplace=True).flatten(1))


@dataclasses.dataclass(frozen=True)
class Case:
    """What ``kit.run`` grows."""

    layout: Any
    pair: Callable[[], nn.Module]
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    points: dict[str, str] = dataclasses.field(default_factory=lambda: {"early": "pair"})

    def example(self, seed: int = 0) -> Tensor:
        return torch.randn(SHAPES[self.layout], generator=torch.Generator().manual_seed(seed))

    def build(self) -> nn.Module:
        with draw_from(torch.Generator().manual_seed(0)):
            host = Host(self.pair())
            host(self.example())
        return host

    def model(self, *, config: GrowthConfig = LENIENT, seed: int = 0, emit: Emit = discard) -> GrowableModel:
        return GrowableModel(self.build(), self.points, self.example(), config=config, seed=seed, emit=emit)


def case_of(name: str) -> Case:
    return Case(*PAIRS[name])


def sown(kit: Any, case: Case, **options: Any) -> Any:
    """A run with newborn units."""
    run = kit.run(case)
    run.steps(3)
    run.model.germinate("early", Sowing(blueprint="widen", options={"units": UNITS, **case.options, **options}))
    return run


def fossil(kit: Any, case: Case) -> Any:
    run = sown(kit, case)
    lead_to(run.model, "early", Stage.FOSSILIZED, case.example())
    run.steps(2)
    return run


def layers(pair: nn.Module) -> tuple[Any, Any]:
    found = [part for part in pair.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return found[0], found[-1]


# -- initialisations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch norm", "conv2d", "mlp, module"])
def test_net2net_copies_units_and_breaks_their_symmetry(kit: Any, name: str) -> None:
    run = sown(kit, case_of(name), init="net2net", noise=1e-3)
    body, (first, _) = run.model.slot("early").seed.body, layers(run.model.host.pair)
    rows = first.weight.detach().flatten(1)
    distance = torch.cdist(body.inner.weight.detach().flatten(1), rows)
    nearest, chosen = distance.min(1)
    assert 0.0 < float(nearest.min()) and float(nearest.max()) < 0.05 * float(rows.norm(dim=1).mean())
    assert len(set(chosen.tolist())) == UNITS
    if first.bias is not None:
        assert torch.equal(body.inner.bias, first.bias[chosen])
    norms = [part for part in run.model.host.pair.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    for theirs, mine in zip(norms, [part for part in body.middle if hasattr(part, "running_mean")], strict=True):
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(mine, key), getattr(theirs, key)[chosen])
    assert not body.outer.weight.any()


def test_more_copies_than_units_are_drawn_in_rounds(kit: Any) -> None:
    run = sown(kit, case_of("linear"), init="net2net", units=15)
    assert run.model.slot("early").seed.body.inner.weight.shape == (15, 4)


def test_the_draw_is_the_seeds_own(kit: Any) -> None:
    def weights(seed: int) -> Tensor:
        model = case_of("linear").model()
        before = kit.chance()
        model.germinate("early", "widen", seed=seed, options={"init": "net2net"})
        assert kit.same(before, kit.chance())
        return model.get_parameter("slots.early.seed.body.inner.weight").detach()

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


GRADMAX: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "linear": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))),
    "tokens": ("NLC", lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))),
    "conv1d": ("NCL", lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2), nn.SiLU(), nn.Conv1d(6, 5, 3, padding=1))),
    "conv2d": ("NCHW", lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3, stride=2))),
}


@pytest.mark.parametrize("name", GRADMAX)
def test_gradmax_directions_give_the_largest_gradient(name: str) -> None:
    case = Case(*GRADMAX[name])
    model = case.model()
    x, target = case.example(1), torch.randn(5, 3, generator=torch.Generator().manual_seed(5))

    def loss() -> Tensor:
        return (model(x) - target).square().mean()

    before = {key: value.clone() for key, value in model.host.state_dict().items()}
    directions = gradmax_directions(model.host.get_submodule("pair"), loss, units=2)
    assert all(torch.equal(value, before[key]) for key, value in model.host.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.germinate("early", "widen", options={"units": 2, "init": "gradmax", "directions": directions})
    assert json.loads(json.dumps(model.topology())) == model.topology()
    lead_to(model, "early", Stage.FOSSILIZED, x)
    body: Any = model.get_submodule("slots.early.seed.body")

    def gradient() -> float:
        return float(torch.autograd.grad(loss(), body.inner.weight)[0].norm())

    assert torch.equal(body(x), torch.zeros_like(body(x))) and body.outer.weight.any()
    found, best = gradient(), body.outer.weight.detach().clone()
    lengths = best.transpose(0, 1).flatten(1).norm(dim=1)
    host: Any = model.get_submodule("host.pair.2")
    torch.testing.assert_close(lengths, host.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).mean().expand(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        columns = torch.linalg.qr(torch.randn(best[:, 0].numel(), 2, generator=generator))[0] * lengths[0]
        with torch.no_grad():
            body.outer.weight.copy_(columns.T.reshape(best.transpose(0, 1).shape).transpose(0, 1))
        assert gradient() <= found
    with torch.no_grad():
        body.outer.weight.copy_(best)
    model.merge("early")


def test_gradmax_refuses_what_would_never_learn_or_act_at_birth() -> None:
    for activation in (nn.ReLU(), nn.Sigmoid(), nn.Softplus()):
        pair = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 5))
        with pytest.raises(ValueError, match=r"must have an activation that is 0 at 0 with a slope, got"):
            gradmax_directions(pair, lambda pair=pair: pair(torch.ones(2, 4)).sum(), units=1)
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
    with pytest.raises(ValueError, match="must have no normalisation between the layers"):
        gradmax_directions(normed, lambda: normed(torch.ones(2, 4)).sum(), units=1)


def test_gradmax_needs_as_many_directions_as_units_and_one_call() -> None:
    pair = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    with pytest.raises(ValueError, match="`units` must be <= 1, the rank of the gradient on this batch, got 2"):
        gradmax_directions(pair, lambda: pair(torch.ones(1, 4)).sum(), units=2)
    with pytest.raises(ValueError, match="`units` must be <= 0, the rank"):
        gradmax_directions(pair, lambda: pair(torch.ones(1, 4)).sum() * 0.0, units=1)
    with pytest.raises(ValueError, match="`loss` must call the submodule once, did so 2 times"):
        gradmax_directions(pair, lambda: pair(torch.ones(1, 4)).sum() + pair(torch.ones(1, 4)).sum(), units=1)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in pair.modules())


# -- refusals ------------------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no units": ("linear", {"units": 0}, ValueError, "`units` must be a whole number >= 1, got 0"),
    "half a unit": ("linear", {"units": 1.5}, ValueError, "`units` must be a whole number >= 1, got 1.5"),
    "init": ("linear", {"init": "magic"}, ValueError, "`init` must be one of zero_out, net2net, gradmax, got 'magic'"),
    "noise": ("linear", {"noise": 0.1}, ValueError, '`noise` must be > 0 and for init "net2net" alone, got 0.1'),
    "negative noise": ("linear", {"init": "net2net", "noise": -1.0}, ValueError, "`noise` must be > 0"),
    "no directions": ("linear", {"init": "gradmax"}, ValueError, "`directions` must be given .* Call .*gradmax_directions"),
    "idle directions": ("linear", {"directions": [[1.0]]}, ValueError, "`directions` must be left out with init 'zero_out'"),
    "relu": ("linear", {"init": "gradmax", "directions": [[1.0]]}, ValueError, "an activation that is 0 at 0 with a slope"),
    "misshapen directions": (
        "mlp, module",
        {"init": "gradmax", "directions": [[1.0]], "units": 2},
        ValueError,
        r"`directions` must be of shape \(2, 5\), got \(1, 1\)",
    ),
    "unknown option": (
        "linear",
        {"width": 2},
        ValueError,
        r"`options` of 'widen' must be among \['units', .*, got \['width'\]",
    ),
    "groups": ("group norm", {"units": 3}, SlotError, "slot 'early' must get whole groups .* a multiple of 2, got 3"),
    "one name": ("linear", {"second": "2"}, ValueError, "`first` and `second` must both be given"),
    "unknown name": (
        "linear",
        {"first": "0", "second": "fc2"},
        SlotError,
        "must sit at a submodule with `fc2` in it, has 0, 1, 2",
    ),
    "no activation named": (
        "mlp, module",
        {"activation": None},
        SlotError,
        "slot 'early' must sit at a pair of layers that computes what the submodule returns",
    ),
    "the wrong activation": (
        "mlp, function",
        {"activation": "relu"},
        SlotError,
        "slot 'early' must sit at a pair of layers that computes what the submodule returns",
    ),
    "no names": (
        "mlp, module",
        {"first": None, "second": None, "activation": None},
        SlotError,
        "slot 'early' must sit at an nn.Sequential of two layers, is at a Mlp",
    ),
}
BAD_PAIRS: dict[str, tuple[Any, Callable[[], nn.Module], str]] = {
    "one layer": ("NC", lambda: nn.Sequential(nn.Linear(4, 5)), "must sit at two layers with hidden units between"),
    "two kinds": (
        "NCHW",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        "must sit between two Linear, two Conv1d or two Conv2d, is between Conv2d and BatchNorm2d",
    ),
    "layer norm": (
        "NC",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)),
        "treat each hidden unit by itself, has LayerNorm",
    ),
    "PReLU": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 5)), "by itself, has PReLU"),
    "three layers": (
        "NC",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)),
        "by itself, has Linear",
    ),
    "grouped": (
        "NCHW",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2)),
        "must sit at layers with groups=1",
    ),
}


@pytest.mark.parametrize("reason", BAD_OPTIONS)
def test_wrong_options_change_nothing(kit: Any, reason: str) -> None:
    name, options, error, match = BAD_OPTIONS[reason]
    run = kit.run(case_of(name))
    run.steps(1)
    before = run.contents()
    with pytest.raises(error, match=match):
        run.model.germinate("early", "widen", options={**run.case.options, **options})
    assert kit.differences(before, run.contents()) == []


@pytest.mark.parametrize("reason", BAD_PAIRS)
def test_what_is_no_pair_is_refused_without_a_trace(kit: Any, reason: str) -> None:
    layout, pair, match = BAD_PAIRS[reason]
    run = kit.run(Case(layout, pair))
    run.steps(1)
    before = run.contents()
    with pytest.raises(SlotError, match=f"^slot 'early' .*{match}"):
        run.model.germinate("early", "widen")
    assert kit.differences(before, run.contents()) == []


def test_a_submodule_that_does_more_is_refused() -> None:
    class More(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    model = Case("NC", More).model()
    with pytest.raises(SlotError, match="computes what the submodule returns"):
        model.germinate("early", "widen", options={"first": "fc1", "second": "fc2", "activation": "act"})


def test_a_submodule_must_be_given_a_tensor_by_position() -> None:
    class ByName(Host):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pair(input=x))

    host = ByName(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)))
    host(torch.zeros(2, 4))
    model = GrowableModel(host, {"early": "pair"}, torch.zeros(2, 4))
    with pytest.raises(
        SlotError, match="slot 'early': submodule `pair` must be given a tensor as its first positional argument"
    ):
        model.germinate("early", "widen")


MERGE_REFUSED: dict[str, tuple[dict[str, str], Callable[[Any], object], str]] = {
    "a slot between": ({"early": "pair", "mid": "pair.1"}, lambda run: None, "slot 'mid' sits between the layers"),
    "a seed at the end": (
        {"early": "pair", "late": "pair.2"},
        lambda run: run.model.germinate("late", "low_rank"),
        "there is a hook or a seed at `pair.2`",
    ),
    "a hook": (
        {"early": "pair"},
        lambda run: run.model.host.pair[1].register_forward_hook(lambda module, args, output: None),
        "there is a hook or a seed at `pair.1`",
    ),
    "a hook before": (
        {"early": "pair"},
        lambda run: run.model.host.pair[2].register_forward_pre_hook(lambda module, args: None),
        "there is a hook or a seed at `pair.2`",
    ),
}


@pytest.mark.parametrize("reason", MERGE_REFUSED)
def test_what_stands_in_the_way_of_a_merge_is_named(kit: Any, reason: str) -> None:
    points, disturb, match = MERGE_REFUSED[reason]
    run = fossil(kit, dataclasses.replace(case_of("linear"), points=points))
    disturb(run)
    before, topology = run.contents(), run.model.topology()
    with pytest.raises(SlotError, match=f"^slot 'early' must not be merged: {match}"):
        run.model.merge("early")
    assert kit.differences(before, run.contents()) == [] and run.model.topology() == topology


def test_a_follower_that_refuses_undoes_a_widening_to_the_bit(kit: Any) -> None:
    run = fossil(kit, case_of("conv2d"))
    run.step()

    def refuse() -> None:
        raise StateMismatch("no")

    run.model.on_topology_change(refuse)
    before, topology, host = run.contents(), run.model.topology(), str(run.model.host)
    with pytest.raises(StateMismatch, match="no"):
        run.model.merge("early")
    assert kit.differences(before, run.contents()) == []
    assert run.model.topology() == topology and str(run.model.host) == host and run.model.grafts() == ()


# -- the registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_are_counted_from_the_host(kit: Any, name: str) -> None:
    case = case_of(name)
    model = case.model()
    before, options = model.num_parameters(), {"units": 6, **case.options}
    said = blueprints.get("widen").parameter_count_on(model.host.get_submodule("pair"), **options)
    model.germinate("early", "widen", options=options)
    assert model.num_parameters() - before == said


def test_widen_is_found_by_name_alone_and_not_built_from_a_width() -> None:
    assert all("widen" not in blueprints.names(layout) for layout in (None, *LAYOUTS))
    row = blueprints.get("widen")
    assert row.from_host and row.options[:2] == ("units", "init") and row.layouts == LAYOUTS[:4]
    for call in (row.build, row.parameter_count):
        with pytest.raises(ValueError, match="`blueprint` must be one that is built from a width, got 'widen'"):
            call(8, "NC")
    assert re.match(r"s\(x\) = W2' act", row.summary)
