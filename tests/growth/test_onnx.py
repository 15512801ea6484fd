"""Round trips: an exported network through torch.export and through ONNX computes the same, for any batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, GrowthPoint, Sowing, Stage
from morphogen.state import draw_from
from morphogen.tasks.hosts import ConvHost, MLPHost, TransformerHost
from morphogen.testing import LENIENT, lead_to

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    # What torch 2.13 may say while it exports an nn.LSTM, to .pt2 and to ONNX.
    "ignore:The tensor attributes .*_flat_weights:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
)


class Recurrent(nn.Module):
    """The sequence first, the feature in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(0))


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    points: dict[str, str | GrowthPoint]
    inputs: Callable[[int], Tensor]
    blueprints: tuple[str, str]
    batch_axis: int = 0

    def __str__(self) -> str:
        return self.name

    def grown(self) -> GrowableModel:
        """One seed fossilised, one in the middle of its ramp."""
        with draw_from(torch.Generator().manual_seed(0)):
            model = GrowableModel(self.build(), self.points, self.inputs(4), config=LENIENT)
        stages = (Stage.FOSSILIZED, Stage.BLENDING)
        for slot, blueprint, operator, stage in zip(self.points, self.blueprints, ("add", "gate"), stages, strict=True):
            chosen: Any = operator
            model.germinate(slot, Sowing(blueprint=blueprint, operator=chosen, blend_ticks=4))
            lead_to(model, slot, stage, self.inputs(4))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.slots.parameters():
                parameter.normal_(std=0.3, generator=generator)
        assert 0 < model.alphas()[list(self.points)[1]] < 1
        return model.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(2))


def transformer() -> nn.Module:
    return TransformerHost(20, 16, num_layers=2, num_heads=2, context_length=8)


BLOCKS: dict[str, str | GrowthPoint] = {"early": "block1", "late": "block2"}
LAYERS: dict[str, str | GrowthPoint] = {"early": "blocks.0", "late": "blocks.1"}
CASES = (
    Case("image", lambda: ConvHost((8, 8), 3, num_pools=1), BLOCKS, lambda n: normal(n, 1, 8, 8), ("conv3x3", "depthwise")),
    Case("image, again", lambda: ConvHost((8, 8), 3), BLOCKS, lambda n: normal(n, 1, 8, 8), ("bottleneck", "squeeze_excite")),
    Case("signal", lambda: ConvHost((8, 8), 3, dimensions=1), BLOCKS, lambda n: normal(n, 1, 12), ("conv1d", "mlp")),
    Case("features", lambda: MLPHost(12, (8, 8), 3), BLOCKS, lambda n: normal(n, 12), ("mlp", "low_rank")),
    Case("features, again", lambda: MLPHost(12, (8, 8), 3), BLOCKS, lambda n: normal(n, 12), ("glu", "norm")),
    Case("tokens", transformer, LAYERS, lambda n: tokens(n, 6), ("attention", "mlp_small")),
    Case("tokens, again", transformer, LAYERS, lambda n: tokens(n, 6), ("flex_attention", "low_rank")),
    Case(
        "sequence first",
        Recurrent,
        {"early": GrowthPoint("lstm", output=0), "late": GrowthPoint("lstm", output=0)},
        lambda n: normal(5, n, 6),
        ("mlp", "low_rank"),
        batch_axis=1,
    ),
)
any_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if "again" in case.name else []) for case in CASES]
)


def plain_of(case: Case) -> tuple[GrowableModel, nn.Module]:
    model = case.grown()
    plain = model.export()
    assert "morphogen" not in {type(part).__module__.partition(".")[0] for part in plain.modules()}
    return model, plain


@any_case
def test_torch_export(case: Case, tmp_path: Path) -> None:
    model, plain = plain_of(case)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(plain, (case.inputs(4),), dynamic_shapes=({case.batch_axis: batch},))
    torch.export.save(program, tmp_path / "grown.pt2")
    loaded = torch.export.load(tmp_path / "grown.pt2").module()
    with torch.no_grad():
        for size in (2, 4, 7):
            assert torch.allclose(loaded(case.inputs(size)), model(case.inputs(size)), rtol=1e-5, atol=1e-5)


@any_case
def test_onnx(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    model, plain = plain_of(case)
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(
        plain,
        (case.inputs(4),),
        tmp_path / "grown.onnx",
        dynamo=True,
        dynamic_shapes=({case.batch_axis: batch},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "grown.onnx", providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    with torch.no_grad():
        for size in (2, 4, 7):
            found = torch.from_numpy(session.run(None, {name: case.inputs(size).numpy()})[0])
            assert torch.allclose(found, model(case.inputs(size)), rtol=1e-5, atol=1e-5)
