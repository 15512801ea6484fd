"""Any host: other people's networks grow without a change to their code."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, GrowthPoint, Sowing, Stage, suggest_points
from morphogen.growth.features import Site
from morphogen.growth.probing import example_call
from morphogen.state import TrainingState, draw_from
from morphogen.testing import LENIENT, check_host, lead_to, same_bits
from morphogen.testing.hosts import floating_tensors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class BasicBlock(nn.Module):
    """As in torchvision and timm: two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.global_pool(self.layer2(self.layer1(x))))


class Encoder(nn.Module):
    """Positions learned, a padding mask, dropout: the sequence first unless told."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=batch_first)
        self.tokens = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden = self.encoder(self.tokens(tokens), src_key_padding_mask=padding)
        return self.head(hidden[:, 0] if self.batch_first else hidden[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, (last, _) = self.lstm(self.tokens(tokens))
        return self.head(hidden.mean(0) + last[-1])


class Parts(NamedTuple):
    features: Tensor
    extra: Tensor | None


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> Parts:
        return Parts(torch.tanh(self.map(x)) * scale, None)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.map(x)]


class Keywords(nn.Module):
    """Keyword arguments alone, a named tuple, a list, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.pair = Pair()
        self.listed = Listed()
        self.head = nn.Linear(8, 3)

    def forward(self, *, inputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.pair(self.stem(inputs), scale=scale).features
        skip, x = self.listed(x)
        return {"logits": self.head(x + skip), "features": x}


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2)])
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    points: dict[str, str | GrowthPoint]
    example: Callable[[], Any]

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        with draw_from(torch.Generator().manual_seed(0)):
            return self.make()

    def model(self) -> GrowableModel:
        return GrowableModel(self.build(), self.points, self.example(), config=LENIENT)


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(1))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


CASES = (
    Case("resnet", ResNet, {"early": "layer1.0", "late": "layer2.0", "norm": "layer1.1.bn1"}, lambda: normal(4, 3, 8, 8)),
    Case(
        "gpt2",
        gpt2,
        {
            "block": "transformer.h.0",
            "mlp": GrowthPoint("transformer.h.1.mlp", layout="NLC"),
            "attention": GrowthPoint("transformer.h.1.attn", layout="NLC", output=0),
            "trunk": GrowthPoint("transformer", output="last_hidden_state"),
        },
        lambda: {"input_ids": tokens(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.int64)},
    ),
    Case(
        "llama",
        llama,
        {"block": "model.layers.0", "mlp": "model.layers.1.mlp", "trunk": GrowthPoint("model", output=0)},
        lambda: {"input_ids": tokens(3, 5)},
    ),
    Case(
        "encoder",
        lambda: Encoder(batch_first=True),
        {"first": "encoder.layers.0", "second": "encoder.layers.1", "inner": "encoder.layers.0.linear1"},
        lambda: tokens(3, 5),
    ),
    Case(
        "encoder, sequence first",
        lambda: Encoder(batch_first=False),
        {"first": "encoder.layers.0", "inner": "encoder.layers.1.linear1", "tokens": "tokens"},
        lambda: tokens(5, 3),
    ),
    Case("lstm", Recurrent, {"memory": GrowthPoint("lstm", output=0), "tokens": "tokens"}, lambda: tokens(5, 3)),
    Case(
        "keywords",
        Keywords,
        {"pair": GrowthPoint("pair", output=0), "listed": GrowthPoint("listed", output=1)},
        lambda: {"inputs": normal(4, 6), "scale": torch.full((8,), 2.0)},
    ),
    Case("tied", Tied, {"tokens": "tokens", "block": "blocks.0"}, lambda: tokens(3, 5)),
)

any_case = pytest.mark.parametrize("case", CASES, ids=str)


def run(module: nn.Module, example: Any) -> list[Tensor]:
    """What a pass returns; chance in it is the same each time."""
    args, kwargs = example_call(example)
    with draw_from(torch.Generator().manual_seed(2)):
        return floating_tensors(module(*args, **kwargs))


def learn(module: nn.Module, example: Any) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients of a training pass."""
    module.train()
    module.zero_grad()
    outputs = run(module, example)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return [output.detach() for output in outputs], {name: p.grad for name, p in module.named_parameters()}


def sown(case: Case, stage: Stage, *blueprints: str, alpha: float = 0.6) -> GrowableModel:
    """A seed in every slot, with random weights, led to ``stage``."""
    model = case.model()
    for index, slot in enumerate(case.points):
        blueprint = (blueprints or ("mlp", "low_rank"))[index % len(blueprints or (0, 0))]
        operator: Any = ("add", "scale", "gate")[index % 3] if not blueprints else "add"
        model.germinate(slot, Sowing(blueprint=blueprint, operator=operator, alpha_target=alpha, blend_ticks=2))
        lead_to(model, slot, stage, case.example())
    stir(model)
    return model


def stir(model: GrowableModel) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=generator)


def close(left: list[Tensor], right: list[Tensor], tolerance: float = 0.0) -> bool:
    pairs = list(zip(left, right, strict=True))
    if tolerance == 0.0:
        return all(same_bits(a, b) for a, b in pairs)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


@any_case
def test_slots_and_newborn_seeds_leave_no_trace(case: Case) -> None:
    check_host(case.build(), case.points, case.example())


@any_case
def test_incubation_is_not_felt_by_the_host(case: Case) -> None:
    expected, gradients = learn(case.build(), case.example())
    model = sown(case, Stage.TRAINING)
    found, grown = learn(model, case.example())
    assert close(expected, found)
    for name, gradient in gradients.items():
        other = grown[f"host.{name}"]
        assert (gradient is None) == (other is None)
        assert gradient is None or other is None or same_bits(gradient, other), name
    for slot in case.points:
        assert any(bool(grad.any()) for name, grad in grown.items() if name.startswith(f"slots.{slot}.") and grad is not None)


@any_case
@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
def test_everything_upstream_of_a_seed_that_acts_learns(case: Case, stage: Stage) -> None:
    _, bare = learn(case.build(), case.example())
    model = sown(case, stage)
    plain, _ = learn(case.build(), case.example())
    outputs, gradients = learn(model, case.example())
    assert not close(plain, outputs, 1e-4)
    for name, gradient in bare.items():
        if gradient is not None and bool(gradient.any()):
            found = gradients[f"host.{name}"]
            assert found is not None and bool(found.any()), name
    for slot in case.points:
        seeds = [grad for name, grad in gradients.items() if name.startswith(f"slots.{slot}.")]
        assert seeds and all(grad is not None and bool(grad.isfinite().all()) for grad in seeds)


@any_case
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
def test_export_computes_what_the_model_does(case: Case, stage: Stage) -> None:
    model = sown(case, stage).eval()
    plain = model.export()
    with torch.no_grad():
        assert close(run(model, case.example()), run(plain, case.example()))
        twin = copy.deepcopy(plain)
        assert close(run(model, case.example()), run(twin, case.example()))
    expected, _ = learn(model, case.example())
    if stage is not Stage.TRAINING:
        found, gradients = learn(plain, case.example())
        assert close(expected, found, 1e-5)
        assert all(grad is not None for name, grad in gradients.items() if "seed" in name)
    assert not {type(part).__module__.partition(".")[0] for part in plain.modules()} & {"morphogen"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in plain.modules())


@any_case
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
def test_a_run_goes_on_in_a_fresh_model(case: Case, stage: Stage, tmp_path: Path) -> None:
    model = sown(case, stage)
    TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)).save(tmp_path / "run")
    fresh = case.model()
    state = TrainingState(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9))
    state.load(tmp_path / "run")
    assert fresh.topology() == model.topology()
    assert close(learn(model, case.example())[0], learn(fresh, case.example())[0])
    state.verify()


@any_case
def test_a_deep_copy_is_the_same_and_apart(case: Case) -> None:
    model = sown(case, Stage.BLENDING)
    twin = copy.deepcopy(model)
    before = run(model.eval(), case.example())
    assert close(before, run(twin.eval(), case.example()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
    assert close(before, run(model, case.example()))


@any_case
def test_suggested_points_grow(case: Case) -> None:
    host = case.build()
    found = suggest_points(host, case.example())
    assert found
    model = GrowableModel(host, {each.name: each.point for each in found}, case.example(), config=LENIENT)
    for each in found:
        site = model.slot(each.name).site
        assert (site.width, site.layout, site.path) == (each.width, each.layout, each.path)
        model.germinate(each.name, "low_rank")
        lead_to(model, each.name, Stage.FOSSILIZED, case.example())
    stir(model)
    with torch.no_grad():
        plain = model.eval().export()
        assert close(run(model, case.example()), run(plain, case.example()))


# -- elements of what a submodule returns -------------------------------------------------------------------------------


def test_the_rest_of_an_output_stays_as_it_is() -> None:
    case = CASES[1]
    model = sown(case, Stage.FOSSILIZED).eval()
    seen: list[Any] = []
    model.host.get_submodule("transformer").register_forward_hook(lambda part, args, output: seen.append(output))
    with torch.no_grad():
        model(**case.example())
    assert type(seen[0]).__name__.startswith("BaseModelOutput") and seen[0].attentions is None
    assert seen[0].past_key_values is not None and seen[0].last_hidden_state is seen[0]["last_hidden_state"]


@pytest.mark.parametrize(
    "returned",
    [
        (torch.zeros(2, 3), None),
        [torch.zeros(2, 3), 5],
        Parts(torch.zeros(2, 3), None),
        {"features": torch.zeros(2, 3), "extra": None},
        transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(2, 3), attentions=(torch.ones(1),)),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_one_element_is_replaced_in_a_copy_of_the_same_kind(returned: Any) -> None:
    site = Site("", "NC", 3, output=0)
    before = copy.copy(returned)
    after = site.replaced(returned, torch.ones(2, 3))
    assert type(after) is type(returned) and torch.equal(site.feature(after, "a"), torch.ones(2, 3))
    assert torch.equal(site.feature(returned, "a"), torch.zeros(2, 3)) and len(after) == len(before)
    if isinstance(returned, dict):
        keys = list(returned)
        assert list(after) == keys and after[keys[1]] is before[keys[1]]
        assert Site("", "NC", 3, output=keys[0]).feature(after, "a") is after[keys[0]]
    else:
        assert after[1] is before[1]


def test_a_wrong_element_is_named() -> None:
    host = Keywords()
    example = CASES[6].example()
    with pytest.raises(SlotError, match=r"slot 'a': submodule `pair` must return a tensor.*GrowthPoint\('pair', output=0\)"):
        GrowableModel(host, {"a": "pair"}, example)
    with pytest.raises(SlotError, match="slot 'a': element 1 of what submodule `pair` returns must be a tensor"):
        GrowableModel(host, {"a": GrowthPoint("pair", output=1)}, example)
    with pytest.raises(SlotError, match="slot 'a': element 7 of what submodule `listed` returns.*list of 2"):
        GrowableModel(host, {"a": GrowthPoint("listed", output=7)}, example)
    with pytest.raises(SlotError, match="slot 'a': element 0 of what submodule `stem` returns must be a tensor"):
        GrowableModel(host, {"a": GrowthPoint("stem", output=0)}, example)
    with pytest.raises(ValueError, match="`output` must be an index from 0 on"):
        GrowthPoint("pair", output=-1)
    assert not any(part._forward_hooks for part in host.modules())


# -- the sequence first -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5])
def test_alphas_of_a_sequence_first_feature_are_those_of_the_samples(size: int) -> None:
    case = CASES[5]
    model = sown(case, Stage.FOSSILIZED, alpha=1.0).eval()
    inputs = tokens(5, size)
    alphas = torch.linspace(0, 1, size)
    with torch.no_grad():
        together = model(inputs, alphas={"memory": alphas})
        alone = [model(inputs[:, i : i + 1], alphas={"memory": float(alphas[i])}) for i in range(size)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_the_batch_axis_is_told_by_the_layers_that_know() -> None:
    sites = {name: slot.site for name, slot in CASES[4].model().slots.items()}
    assert all(site.sequence_first and site.layout == "NLC" for site in sites.values())
    assert not any(slot.site.sequence_first for slot in CASES[3].model().slots.values())

    class Turned(Encoder):
        """Tokens (N, L) into an encoder that has the sequence first: the embedding has not."""

        def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
            return self.head(self.encoder(self.tokens(tokens).transpose(0, 1))[0])

    points = {"tokens": "tokens", "layer": "encoder.layers.0"}
    model = GrowableModel(Turned(batch_first=False), points, tokens(3, 5))
    assert [model.slot(name).site.sequence_first for name in points] == [False, True]
    with pytest.raises(SlotError, match="slot 'tokens': layout must be told"):
        GrowableModel(Turned(batch_first=False), points, tokens(4, 4))
    told = {"tokens": GrowthPoint("tokens", layout="NLC"), "layer": GrowthPoint("encoder.layers.0", layout="LNC")}
    model = GrowableModel(Turned(batch_first=False), told, tokens(4, 4))
    assert [model.slot(name).site.sequence_first for name in points] == [False, True]


# -- the shortcuts of nn.TransformerEncoder in inference ------------------------------------------------------------------


def test_inference_shortcuts_do_not_pass_by_a_seed() -> None:
    model = sown(CASES[3], Stage.FOSSILIZED).eval()
    inputs = tokens(3, 5)
    expected = model(inputs)  # with gradients: no shortcut
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected, atol=1e-6)
        assert torch.allclose(model.export()(inputs), expected, atol=1e-6)
    frozen = model.requires_grad_(False)
    assert torch.allclose(frozen(inputs), expected, atol=1e-6)


def test_nested_tensors_are_refused_by_seeds_and_avoided_by_exports() -> None:
    model = sown(CASES[3], Stage.FOSSILIZED).eval()
    inputs, padding = tokens(3, 5), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    expected = model(inputs, padding)
    plain = model.export()
    with torch.no_grad():
        with pytest.raises(TypeError, match="slot 'inner': .*nested.*use_nested_tensor = False"):
            model(inputs, padding)
        assert torch.allclose(plain(inputs, padding), expected, atol=1e-6)
    model.host.get_submodule("encoder").use_nested_tensor = False
    with torch.no_grad():
        assert torch.allclose(model(inputs, padding), expected, atol=1e-6)
