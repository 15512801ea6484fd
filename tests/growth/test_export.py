"""Export: a plain module, equal to the bit, that runs where morphogen is not installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, GrowthPoint, Sowing, Stage, blueprints
from morphogen.growth.blueprints import blueprint, registry
from morphogen.growth.layouts import LAYOUTS, Layout
from morphogen.growth.lifecycle import OPERATORS
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "morphogen":
            raise ImportError("morphogen is not here")

sys.meta_path.insert(0, Block())
try:
    import morphogen
except ImportError:
    pass
else:
    raise SystemExit("morphogen can be imported")

import pathlib
import torch

torch.set_num_threads(1)
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    expected = torch.load(file.with_suffix(".pt"), weights_only=True)
    with torch.no_grad():
        found = torch.export.load(file).module()(expected["inputs"])
    print(file.stem, float((found - expected["outputs"]).abs().max()))
assert not any(name.partition(".")[0] == "morphogen" for name in sys.modules)
"""


class Chain(nn.Module):
    """A layer of the layout for each blueprint that works on it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        kind = {"NC": nn.Linear, "NLC": nn.Linear, "NCL": nn.Conv1d, "NCHW": nn.Conv2d}[layout]
        kernel = () if kind is nn.Linear else (1,)
        self.layers = nn.ModuleDict({name: kind(6, 6, *kernel) for name in blueprints.names(layout)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = nn.functional.leaky_relu(layer(x))  # no dead unit can shut a gate
        return x


def inputs_of(layout: Layout) -> Tensor:
    shape = {"NC": (3, 6), "NLC": (3, 4, 6), "NCL": (3, 6, 4), "NCHW": (3, 6, 4, 4)}[layout]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def chain(layout: Layout, turn: int) -> GrowableModel:
    """Every blueprint of the layout fossilised in one host; ``turn`` shifts which operator each one has."""
    points = {name: GrowthPoint(f"layers.{name}", layout) for name in blueprints.names(layout)}
    model = GrowableModel(Chain(layout), points, inputs_of(layout), config=LENIENT)
    generator = torch.Generator().manual_seed(1)
    for index, name in enumerate(points):
        operator = OPERATORS[(index + turn) % len(OPERATORS)]
        target = 1.0 if index % 2 else 0.37
        model.germinate(name, Sowing(blueprint=name, operator=operator, blend_ticks=2, alpha_target=target))
        lead_to(model, name, Stage.FOSSILIZED if index % 3 else Stage.HOLDING, inputs_of(layout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def modules_of(plain: nn.Module) -> set[str]:
    return {type(part).__module__.partition(".")[0] for part in plain.modules()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_blueprint_runs_where_morphogen_is_not_installed(tmp_path: Path) -> None:
    """Exported to .pt2 and loaded by another Python that refuses to import morphogen: the same to the bit."""
    for layout in LAYOUTS:
        for turn in range(len(OPERATORS)):
            model, inputs = chain(layout, turn), inputs_of(layout)
            program = torch.export.export(model.export(), (inputs,))
            torch.export.save(program, tmp_path / f"{layout}{turn}.pt2")
            with torch.no_grad():
                torch.save({"inputs": inputs, "outputs": model(inputs)}, tmp_path / f"{layout}{turn}.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(line.split() for line in ran.stdout.splitlines())
    assert found == {f"{layout}{turn}": "0.0" for layout in LAYOUTS for turn in range(len(OPERATORS))}


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_export_in_every_stage_is_what_the_model_computes(case: HostCase, live_stage: Stage) -> None:
    model = case.model()
    model.germinate("early", Sowing(blueprint="mlp", operator="gate", alpha_target=0.7))
    model.germinate("late", "norm")
    lead_to(model, "early", live_stage, case.example())
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    model.host.get_submodule("norm").train()
    plain = model.export()
    assert not any(part.training for part in plain.modules()) and model.host.get_submodule("norm").training
    acts = live_stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    with torch.no_grad():
        for size in (5, 9):
            assert torch.equal(plain(case.example(size)), model.eval()(case.example(size)))
    assert any("seed" in name for name in plain.state_dict()) == acts
    assert not any(part._forward_hooks for part in plain.modules())
    grown = plain.get_submodule("norm") if acts else plain
    assert modules_of(grown) == modules_of(plain) == {"torch"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("early_conversion", [True, False])
def test_a_partial_alpha_is_the_same_in_other_dtypes(dtype: torch.dtype, early_conversion: bool) -> None:
    for operator in OPERATORS:
        case = HostCase("NCHW")
        example = case.example().to(dtype)
        model = case.model()
        if early_conversion:
            model.to(dtype)
        model.germinate("early", Sowing(blueprint="mlp", operator=operator, alpha_target=0.3))
        lead_to(model, "early", Stage.HOLDING, example if early_conversion else case.example())
        model.to(dtype).eval()
        with torch.no_grad():
            for parameter in model.slots.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
            assert torch.equal(model.export()(example), model(example))


def test_export_under_autocast_is_the_same_too() -> None:
    case = HostCase("NCHW")
    model = case.model()
    model.germinate("early", Sowing(blueprint="conv3x3", operator="gate", alpha_target=0.3))
    lead_to(model, "early", Stage.HOLDING, case.example())
    plain = model.eval().export()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(case.example()), model(case.example()))


def test_the_exported_module_trains_and_shares_nothing(kit: Any) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", Stage.FOSSILIZED)
    before = run.contents()
    plain = run.model.export().train()
    ours = {tensor.data_ptr() for tensor in run.model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in plain.state_dict().values()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        plain(run.case.example()).square().mean().backward()
        optimizer.step()
    assert kit.differences(before, run.contents()) == []


def test_state_dict_goes_into_a_second_export(tmp_path: Path) -> None:
    case = HostCase("NCHW")
    plains: list[nn.Module] = []
    for seed in (0, 1):
        model = case.model(seed=seed)
        model.germinate("early", "conv3x3", operator="gate")
        lead_to(model, "early", Stage.FOSSILIZED, case.example())
        plains.append(model.export())
    first, second = plains
    save_file(first.state_dict(), tmp_path / "grown.safetensors")
    assert not torch.equal(first(case.example()), second(case.example()))
    second.load_state_dict(load_file(tmp_path / "grown.safetensors"))
    assert torch.equal(first(case.example()), second(case.example()))


def test_parts_of_a_seed_with_confusable_names_and_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))

    @blueprint("confusable", layouts=("NC",))
    class Confusable(nn.Module):
        def __init__(self, width: int, layout: Layout) -> None:
            super().__init__()
            self.a_b = nn.Linear(width, width)
            self.a = nn.Sequential()
            self.a.b = nn.Linear(width, width)
            self.base = nn.Linear(width, width)
            self.register_buffer("scale", torch.full((width,), 2.0))

        def forward(self, h: Tensor) -> Tensor:
            return self.base(torch.tanh(self.a_b(self.a.b(h * self.scale))))

        @staticmethod
        def parameter_count(width: int, layout: Layout) -> int:
            return 3 * (width**2 + width)

    example = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    model = grown_alone(nn.Sequential(nn.Linear(6, 6)), "0", example, "confusable")
    plain, inputs = model.export(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(inputs), model(inputs))
    assert any(torch.equal(buffer, torch.full((6,), 2.0)) for buffer in plain.buffers())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())


def test_other_peoples_hooks_are_kept_on_both_sides(kit: Any) -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh())
    host[2].register_forward_hook(lambda part, args, out: out * 2)
    host[0].register_forward_pre_hook(lambda part, args: (args[0] + 1,))
    host[0].register_forward_hook(lambda part, args, out: out * 3)
    example = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    model = GrowableModel(host, {"a": "0", "b": "1"}, example, config=LENIENT)
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in host.modules()]
    for slot in ("a", "b"):
        model.germinate(slot, "low_rank")
        lead_to(model, slot, Stage.FOSSILIZED, example)
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    plain, inputs = model.eval().export(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(inputs), model(inputs))
    assert [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in host.modules()] == hooks


def test_a_hook_behind_ours_sees_the_grown_feature_in_the_plain_module_too() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = GrowableModel(host, {"a": "0"}, torch.ones(2, 4), config=LENIENT)
    host[0].register_forward_hook(lambda part, args, out: out * 3)
    model.germinate("a", "low_rank")
    lead_to(model, "a", Stage.FOSSILIZED, torch.ones(2, 4))
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval().export()(inputs), model(inputs))


def test_points_inside_each_other_and_at_the_same_place() -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    points = {"outer": "0", "inner": "0.0", "again": "0.0", "all": ""}
    model = GrowableModel(host, points, torch.ones(2, 4), config=LENIENT)
    for index, slot in enumerate(points):
        model.germinate(slot, Sowing(blueprint="mlp", operator=OPERATORS[index % 3]))
        lead_to(model, slot, Stage.FOSSILIZED, torch.randn(2, 4, generator=torch.Generator().manual_seed(2)))
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    plain = model.eval().export()
    assert torch.equal(plain(inputs), model(inputs)) and modules_of(plain) == {"torch"}


class Attend(nn.Module):
    """A block with more than one argument, by position and by keyword, and an optional one."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x = self.map(x) * scale
        return x if mask is None else x * mask


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Attend(), Attend(), Attend()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.third(self.second(self.first(x, mask, scale=0.5), mask=mask))


def test_a_point_with_several_arguments() -> None:
    example = (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.ones(3, 6))
    points = {"a": "first", "b": "second", "c": "third"}
    model = GrowableModel(Attending(), points, example, config=LENIENT)
    for slot in points:
        model.germinate(slot, "mlp")
        lead_to(model, slot, Stage.FOSSILIZED, example)
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    plain = model.eval().export()
    assert torch.equal(plain(*example), model(*example))


class Open(nn.Module):
    """A block that passes on whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, *inputs: Tensor, **options: float) -> Tensor:
        return self.map(inputs[0]) * options.get("scale", 1.0)


class Opening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Open()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, scale=0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_point_whose_arguments_are_open() -> None:
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    model = GrowableModel(Opening(), {"a": "block"}, inputs, config=LENIENT)
    model.germinate("a", "mlp")
    lead_to(model, "a", Stage.FOSSILIZED, inputs)
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    plain = model.eval().export()
    assert torch.equal(plain(inputs), model(inputs))
    plain.train()(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    program = torch.export.export(plain.eval(), (inputs,)).module()
    assert torch.equal(program(inputs), model(inputs))


class Aliased(nn.Module):
    """Registers a block under two names, and calls it by the one that is not the point."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.first = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def grown_alone(host: nn.Module, path: str, inputs: Tensor, name: str = "mlp") -> GrowableModel:
    model = GrowableModel(host, {"a": path}, inputs, config=LENIENT)
    model.germinate("a", name)
    lead_to(model, "a", Stage.FOSSILIZED, inputs)
    for parameter in model.slots.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    return model.eval()


def test_a_submodule_with_two_names_is_grown_under_both() -> None:
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for path in ("blocks.0", "first"):
        model = grown_alone(Aliased(), path, inputs)
        assert torch.equal(model.export()(inputs), model(inputs))


class Looks(nn.Module):
    """Reads the weight and a plain attribute of the grown submodule, as a tied head does."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) @ self.map.weight / self.map.in_features


def test_a_host_may_read_the_parts_of_a_grown_submodule(tmp_path: Path) -> None:
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for points in ({"a": "map"}, {"a": "map", "b": "map"}):
        model = GrowableModel(Looks(), points, inputs, config=LENIENT)
        for slot in points:
            model.germinate(slot, "mlp")
            lead_to(model, slot, Stage.FOSSILIZED, inputs)
        for parameter in model.slots.parameters():
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
        plain = model.eval().export()
        for each in (plain, copy.deepcopy(plain)):
            assert torch.equal(each(inputs), model(inputs))
            assert len(list(each.parameters())) == len(list(model.parameters()))
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            each(inputs).square().sum().backward()
            optimizer.step()
            assert each.map.weight is next(each.map.base.parameters() if len(points) == 1 else each.map.base.base.parameters())


def test_a_host_that_cannot_be_exported_is_told_so(kit: Any) -> None:
    class Helps(nn.Linear):
        def help(self) -> int:
            return 1

    class UsesMethods(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = Helps(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x) * self.map.help()

    class Hides(nn.Module):
        """Calls a submodule through a list that is no ModuleList."""

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 6)
            self.hidden = [self.map]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x)

    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for host, match in ((UsesMethods(), "no attribute 'help'.*methods"), (Hides(), "must compute what the model does")):
        model = grown_alone(host, "map", inputs)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        hooks = [list(part._forward_hooks) for part in model.modules()]
        with pytest.raises(SlotError, match=match):
            model.export()
        assert kit.same(before, dict(model.state_dict()))
        assert hooks == [list(part._forward_hooks) for part in model.modules()]


class Untraceable(nn.Module):
    __module__ = "morphogen.made_up"

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) if bool(x.sum() > 0) else x


def test_a_class_of_ours_that_cannot_be_traced_is_named() -> None:
    model = grown_alone(Untraceable(), "map", torch.ones(2, 6))
    with pytest.raises(SlotError, match="class Untraceable cannot be exported, as its forward cannot be traced"):
        model.export()
