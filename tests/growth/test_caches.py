"""Caches of keys and values: pointwise seeds compute the same step by step, seeds that mix positions say that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, GrowthPoint, Sowing, Stage, blueprints
from morphogen.growth.caches import mixes_positions
from morphogen.growth.features import Site
from morphogen.growth.lifecycle import OPERATORS
from morphogen.growth.operators import Seed
from morphogen.state import draw_from
from morphogen.testing import LENIENT, lead_to

transformers = pytest.importorskip("transformers")

Points = dict[str, "str | GrowthPoint"]


def gpt2() -> tuple[nn.Module, Points]:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    mlp = GrowthPoint("transformer.h.1.mlp", layout="NLC")
    return transformers.GPT2LMHeadModel(config), {"block": "transformer.h.0", "mlp": mlp}


def llama() -> tuple[nn.Module, Points]:
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
    trunk = GrowthPoint("model", output="last_hidden_state")
    return transformers.LlamaForCausalLM(config), {"block": "model.layers.0", "mlp": "model.layers.1.mlp", "trunk": trunk}


INPUTS = torch.randint(1, 11, (3, 5), generator=torch.Generator().manual_seed(1))
EXAMPLE: dict[str, Any] = {"input_ids": INPUTS}
any_host = pytest.mark.parametrize("make", [gpt2, llama])


def dormant(make: Callable[[], tuple[nn.Module, Points]]) -> GrowableModel:
    with draw_from(torch.Generator().manual_seed(0)):
        host, points = make()
    return GrowableModel(host, points, EXAMPLE, config=LENIENT)


def stir(model: GrowableModel) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=generator)


def step_by_step(model: Any, inputs: Tensor) -> Tensor:
    logits: list[Tensor] = []
    cache = None
    for position in range(inputs.shape[1]):
        output = model(input_ids=inputs[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


def generated(model: GrowableModel, use_cache: bool) -> Tensor:
    return model.host.generate(INPUTS, min_new_tokens=3, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=use_cache)


@any_host
def test_seeds_that_work_at_each_position_work_with_a_cache(make: Any) -> None:
    model = dormant(make)
    for slot, blueprint in zip(model.stages(), ("mlp", "low_rank", "norm"), strict=False):
        model.germinate(slot, blueprint)
        lead_to(model, slot, Stage.FOSSILIZED, EXAMPLE)
    stir(model)
    with torch.no_grad():
        whole = model.eval()(input_ids=INPUTS, use_cache=False).logits
        assert torch.allclose(step_by_step(model, INPUTS), whole, atol=1e-5)
        assert torch.allclose(step_by_step(model.export(), INPUTS), whole, atol=1e-5)
        assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


@any_host
@pytest.mark.parametrize(
    "sowing",
    [Sowing(blueprint="attention"), Sowing(blueprint="conv1d", operator="gate", options={"causal": True})],
    ids=["attention", "conv1d"],
)
def test_seeds_that_mix_positions_refuse_a_cache(make: Any, sowing: Sowing) -> None:
    model = dormant(make)
    model.germinate("mlp", sowing)
    lead_to(model, "mlp", Stage.TRAINING, EXAMPLE)
    with torch.no_grad():
        step_by_step(model, INPUTS)  # it does not act yet
    lead_to(model, "mlp", Stage.FOSSILIZED, EXAMPLE)
    stir(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=INPUTS, use_cache=True)  # the first pass sees all positions
        for module in (model, model.host):
            with pytest.raises(SlotError, match="slots 'mlp' must see whole sequences.*cache of 1 positions.*use_cache=False"):
                step_by_step(module, INPUTS)
        with pytest.raises(SlotError, match="must see whole sequences"):
            generated(model, use_cache=True)
        generated(model, use_cache=False)
        plain = model.export()
        assert not any(part._forward_pre_hooks for part in plain.modules())
    model.excise("mlp")
    with torch.no_grad():
        step_by_step(model, INPUTS)


def test_who_mixes_positions_is_found_by_trying() -> None:
    site = Site("", "NLC", 16)
    pointwise = {"glu", "low_rank", "low_rank_large", "mlp", "mlp_large", "mlp_small", "norm"}
    for name in blueprints.names("NLC"):
        for operator in OPERATORS:
            with draw_from(torch.Generator().manual_seed(0)):
                seed = Seed(blueprints.get(name).build(16, "NLC"), operator, 16, "NLC")
            before = {key: tensor.clone() for key, tensor in seed.state_dict().items()}
            assert mixes_positions(seed, site) == (name not in pointwise), (name, operator)
            assert all(torch.equal(before[key], tensor) for key, tensor in seed.state_dict().items())
