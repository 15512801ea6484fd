"""Hosts to test with, one for each layout, the checks that any host has to pass, and a guide through the stages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, GrowthPoint, Stage, blueprints
from morphogen.growth.layouts import LAYOUTS, Layout, width_of
from morphogen.growth.lifecycle import NEXT_STAGE
from morphogen.growth.probing import Example, example_call
from morphogen.state import draw_from
from morphogen.state.generators import read_global_generators, write_global_generators
from morphogen.telemetry.events import Emit, discard

LENIENT = GrowthConfig(
    gates=GateConfig(min_training_ticks=0, min_blending_ticks=0, min_holding_ticks=0, min_contribution=-1e30)
)
"""Gates that ask for fresh readings and for nothing else, so that a test reaches any stage in a few ticks."""

_CLASSES = 3


@dataclasses.dataclass(frozen=True)
class HostCase:
    """A small host whose features have ``layout``: BatchNorm and an in-place nonlinearity after a growth point where it can.

    Attributes:
        layout: Of the features at both growth points.
        width: Their channels.
    """

    layout: Layout
    width: int = 8

    def __str__(self) -> str:
        """Return the layout, as the id of a test."""
        return self.layout

    @property
    def points(self) -> dict[str, str]:
        """The growth points, in the order of execution: after a normalisation, and after a layer before the head."""
        return {"early": "norm", "late": "body"}

    def build(self, seed: int = 0) -> nn.Module:
        """Return a new host, equal for equal seeds; draws from no global generator."""
        with draw_from(torch.Generator().manual_seed(seed)):
            return _HOSTS[self.layout](self.width)

    def example(self, size: int = 5, num_samples: int = 4, seed: int = 0) -> Tensor:
        """Return an input of ``num_samples`` samples, ``size`` long (and wide) where the layout has space or time."""
        shape = {
            "NC": (num_samples, 6),
            "NCL": (num_samples, 2, size),
            "NLC": (num_samples, size, 6),
            "NCHW": (num_samples, 3, size, size),
        }[self.layout]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def model(self, *, config: GrowthConfig = LENIENT, seed: int = 0, emit: Emit = discard) -> GrowableModel:
        """Return a new growable model over :meth:`build`."""
        return GrowableModel(self.build(seed), self.points, self.example(), config=config, seed=seed, emit=emit)


class _Features(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.act(self.norm(self.stem(x))))))


class _Signal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.act(self.norm(self.stem(x))))).mean(2))


class _Tokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.act(self.norm(self.stem(x))))))


class _Image(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.act(self.norm(self.stem(x))))).mean((2, 3)))


_HOSTS: dict[Layout, type[nn.Module]] = {"NC": _Features, "NCL": _Signal, "NLC": _Tokens, "NCHW": _Image}


def host_cases(width: int = 8) -> tuple[HostCase, ...]:
    """Return one case for each layout; ``str`` of a case is the id of a test."""
    return tuple(HostCase(layout, width) for layout in LAYOUTS)


def lead_to(model: GrowableModel, slot: str, stage: Stage, example: Example) -> None:
    """Take the seed in ``slot`` on to ``stage`` through every gate, as a run would; weights are not stepped.

    Gradients come from training passes on ``example`` and are dropped at the end. Gates must be as in :data:`LENIENT`.

    Args:
        model: The model; its mode is kept, its clock goes on.
        slot: A slot whose seed is in an earlier stage than ``stage``.
        stage: Where to stop. From PRUNED on, the seed is pruned first.
        example: Input of a forward pass.

    Raises:
        AssertionError: A gate refused, or the stage cannot be reached.
    """
    training = model.training
    for _ in range(1000):
        present = model.stages()[slot]
        if present is stage:
            break
        if stage > Stage.FOSSILIZED or stage is Stage.DORMANT:
            _cool(model, slot, present)
        else:
            _lift(model, slot, present, example)
    else:
        raise AssertionError(f"{slot!r} must reach {stage.name}, stays {model.stages()[slot].name}. Germinate it first.")
    model.zero_grad(set_to_none=True)
    model.train(training)


def _cool(model: GrowableModel, slot: str, present: Stage) -> None:
    if present <= Stage.HOLDING:
        model.prune(slot)
    elif present is Stage.FOSSILIZED:
        model.excise(slot)
    else:
        model.tick()


def _lift(model: GrowableModel, slot: str, present: Stage, example: Example) -> None:
    if present is Stage.BLENDING and model.slot(slot).state.ramp is not None:
        model.tick()
        return
    args, kwargs = example_call(example)
    model.train()
    model.zero_grad(set_to_none=True)
    _backward(model(*args, **kwargs))
    if model.needs_shadow:
        with model.shadow():
            _backward(model(*args, **kwargs))
    model.sense()
    if present in NEXT_STAGE:
        gate = model.advance(slot)
    else:
        model.record_contribution(slot, 1.0, 0.0)
        gate = model.fossilize(slot)
    assert gate.passed, f"{slot!r} must pass into {gate.into.name}, lacks {[check.value for check in gate.refusals]}."


def _backward(output: object) -> None:
    torch.stack([tensor.float().square().mean() for tensor in floating_tensors(output)]).sum().backward()


def check_host(host: nn.Module, points: Mapping[str, str | GrowthPoint], example: Example) -> None:
    """Check that slots and newborn seeds on ``host`` leave no trace; works on copies.

    Args:
        host: Any module that :class:`GrowableModel` should grow.
        points: As for GrowableModel.
        example: As for GrowableModel.

    Raises:
        AssertionError: Outputs, ``state_dict``, modes or a global generator changed, or a declared width is not the real one.
    """
    bare, grown = copy.deepcopy(host), copy.deepcopy(host)
    modes = {name: part.training for name, part in host.named_modules()}
    chance = chance_state()
    model = GrowableModel(grown, points, example, config=LENIENT)
    for slot in points:
        layout = model.slot(slot).site.layout
        for name in blueprints.names(layout):
            model.germinate(slot, name)
            _same_tensors(f"{name!r} germinated in {slot!r}", bare.state_dict(), grown.state_dict())
            lead_to(model, slot, Stage.DORMANT, example)
    assert chance_state() == chance, "slots and seeds must draw from no global generator, one of them moved."
    assert {name: part.training for name, part in grown.named_modules()} == modes, "slots must keep train/eval modes."
    assert list(model.stages()) == list(points), f"slots must be in the order of the points, are {list(model.stages())}."
    _check_widths(model, example)
    for mode in (True, False):
        expected, found = (_output(module, mode, example) for module in (bare, model))
        _same_tensors(f"in {'train' if mode else 'eval'} mode", expected, found)


def _output(module: nn.Module, training: bool, example: Example) -> dict[str, Tensor]:
    """Run a copy of ``module`` in one mode; dropout and the like draw what they would draw next, and it is put back."""
    args, kwargs = example_call(copy.deepcopy(example))
    outputs: dict[str, Tensor] = {}
    module = copy.deepcopy(module).train(training)
    chance = read_global_generators()
    tensors = floating_tensors(module(*args, **kwargs))
    write_global_generators(chance)
    for index, value in enumerate(tensors):
        outputs[f"output {index}"] = value.detach()
    return outputs


def floating_tensors(output: object) -> list[Tensor]:
    """Return the floating-point tensors in what a host returns, whatever they are nested in."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _check_widths(model: GrowableModel, example: Example) -> None:
    for slot in model.stages():
        site = model.slot(slot).site
        found: list[object] = []
        part = model.host.get_submodule(site.path)
        handle = part.register_forward_hook(lambda module, args, output, found=found: found.append(output))
        _output(model.host, False, example)
        handle.remove()
        width = width_of(site.feature(found[0], slot), site.layout)
        assert width == site.width, f"slot {slot!r} must be {width} wide as its feature, is {site.width}."


def _same_tensors(when: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected), f"{when}: tensors must be {list(expected)}, are {list(found)}."
    for name, tensor in expected.items():
        assert same_bits(tensor, found[name]), f"{when}: `{name}` must be what it is without slots, to the bit."


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors agree in shape, dtype and every bit: signed zeros count, equal NaNs are equal."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def chance_state() -> dict[str, str]:
    """Return the states of the global generators in a form that ``==`` compares."""
    state = read_global_generators()
    return {**{name: repr(value) for name, value in state.items()}, "torch": repr(state["torch"].tolist())}
