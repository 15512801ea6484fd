from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from hypothesis import given, settings, strategies as st

from morphogen.rl.actions import ActionConfig, ActionDistribution, FactoredDistribution, HeadConfig, make

SIZES = (3, 2, 4)


def distribution(sizes: Any, heads: Any = None, exploration: float = 0.0) -> ActionDistribution:
    return make(MultiDiscrete(sizes), ActionConfig(heads=heads, exploration=exploration))


def reachable_mask(actions: ActionDistribution, generator: torch.Generator, num_rows: int) -> torch.Tensor:
    """A random mask with no row of choices empty."""
    assert isinstance(actions, FactoredDistribution)
    mask = torch.rand(num_rows, actions.mask_width, generator=generator) < 0.5
    for head in actions.heads:
        table = mask[:, head.outputs].view(num_rows, -1, head.size)
        keep = torch.randint(head.size, (*table.shape[:2], 1), generator=generator)
        table.scatter_(2, keep, True)
    return mask


def everything(enumeration: Any, actions: ActionDistribution) -> torch.Tensor:
    return torch.tensor(enumeration.actions(), dtype=actions.action_dtype)


@pytest.mark.parametrize("exploration", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_three_heads_match_their_enumeration(
    enumeration: Any, growth_heads: Any, generator: torch.Generator, masked: bool, exploration: float
) -> None:
    reference = enumeration(SIZES, growth_heads, exploration)
    actions = distribution(SIZES, growth_heads, exploration)
    old, new = torch.randn(2, 3, actions.num_outputs, generator=generator)
    mask = reachable_mask(actions, generator, 3) if masked else None
    every = everything(reference, actions)
    for row in range(3):
        row_mask = None if mask is None else mask[row]
        expected, other = reference.probabilities(old[row], row_mask), reference.probabilities(new[row], row_mask)
        assert expected.sum() == pytest.approx(1)
        repeated = None if mask is None else mask[row].expand(len(every), -1)
        result = actions.evaluate(old[row].expand(len(every), -1), every, repeated)
        possible = expected > 0
        np.testing.assert_allclose(
            result.log_prob_BH.sum(1).numpy()[possible], np.log(expected[possible]), rtol=2e-5, atol=2e-6
        )
        entropy = -(expected[possible] * np.log(expected[possible])).sum()
        assert (expected * result.entropy_B.numpy()).sum() == pytest.approx(entropy, rel=1e-5)
        kl = (expected[possible] * np.log(expected[possible] / other[possible])).sum()
        only = None if mask is None else mask[row : row + 1]
        assert actions.kl(old[row : row + 1], new[row : row + 1], only).item() == pytest.approx(kl, rel=1e-4)


def test_each_heads_entropy_is_its_own_also_where_irrelevant(
    enumeration: Any, growth_heads: Any, generator: torch.Generator
) -> None:
    reference, actions = enumeration(SIZES, growth_heads), distribution(SIZES, growth_heads)
    outputs = torch.randn(1, actions.num_outputs, generator=generator)
    every = everything(reference, actions)
    entropy_BH = actions.evaluate(outputs.expand(len(every), -1), every).entropy_BH
    for action, entropy_H in zip(every.tolist(), entropy_BH, strict=True):
        for head, entropy in enumerate(entropy_H.tolist()):
            row = reference.row(action, head, outputs[0], None)
            assert entropy == pytest.approx(-(row * np.log(row)).sum(), rel=1e-5)


HEADS = st.integers(1, 4).flatmap(lambda count: st.tuples(*(st.integers(1, 4) for _ in range(count))))


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[HeadConfig, ...], float, int]:
    sizes = draw(HEADS)
    configs: list[HeadConfig] = []
    for place in range(len(sizes)):
        earlier = [f"h{before}" for before in range(place)]
        chosen = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)) if earlier else []
        deciders = [name for name in earlier if sizes[int(name[1:])] > 1 and draw(st.booleans())][:1]
        choices = {name: (draw(st.integers(0, sizes[int(name[1:])] - 1)),) for name in deciders}
        try:
            distribution(sizes[: place + 1], (*configs, HeadConfig(name=f"h{place}", given=chosen, relevant_when=choices)))
        except ValueError as error:  # the deciders' own conditions may exclude each other
            assert "possible together" in str(error)
            choices = {}
        configs.append(HeadConfig(name=f"h{place}", given=chosen, relevant_when=choices))
    return sizes, tuple(configs), draw(st.sampled_from([0.0, 0.3])), draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(tree=trees(), masked=st.booleans())
def test_any_tree_of_heads_matches_its_enumeration(enumeration: Any, tree: Any, masked: bool) -> None:
    sizes, configs, exploration, number = tree
    reference, actions = enumeration(sizes, configs, exploration), distribution(sizes, configs, exploration)
    generator = torch.Generator().manual_seed(number)
    old, new = torch.randn(2, 1, actions.num_outputs, generator=generator)
    mask = reachable_mask(actions, generator, 1) if masked else None
    row_mask = None if mask is None else mask[0]
    expected, other = reference.probabilities(old[0], row_mask), reference.probabilities(new[0], row_mask)
    every, possible = everything(reference, actions), expected > 0
    assert expected.sum() == pytest.approx(1)
    repeated = None if mask is None else mask.expand(len(every), -1)
    result = actions.evaluate(old.expand(len(every), -1), every, repeated)
    np.testing.assert_allclose(result.log_prob_BH.sum(1).numpy()[possible], np.log(expected[possible]), rtol=1e-4, atol=1e-5)
    kl = (expected[possible] * np.log(expected[possible] / other[possible])).sum()
    assert actions.kl(old, new, mask).item() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    drawn, log_prob_BH = actions.sample(old.expand(64, -1), actions.noise((64,), generator), _rows(mask, 64))
    assert torch.equal(actions.evaluate(old.expand(64, -1), drawn, _rows(mask, 64)).log_prob_BH, log_prob_BH)
    index = {action: place for place, action in enumerate(reference.actions())}
    assert all(possible[index[tuple(action)]] for action in drawn.tolist())
    assert possible[index[tuple(actions.mode(old, mask)[0].tolist())]]


def _rows(mask: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
    return None if mask is None else mask.expand(num_rows, -1)


@pytest.mark.parametrize("exploration", [0.0, 0.25])
def test_samples_are_as_frequent_as_their_probability(
    enumeration: Any, growth_heads: Any, generator: torch.Generator, exploration: float
) -> None:
    reference, actions = enumeration(SIZES, growth_heads, exploration), distribution(SIZES, growth_heads, exploration)
    outputs = torch.randn(1, actions.num_outputs, generator=generator)
    mask = reachable_mask(actions, generator, 1)
    num = 200_000
    drawn, _ = actions.sample(outputs.expand(num, -1), actions.noise((num,), generator), mask.expand(num, -1))
    flat = np.ravel_multi_index(tuple(drawn.t().numpy()), SIZES)
    share = np.bincount(flat, minlength=len(reference.actions())) / num
    expected = reference.probabilities(outputs[0], mask[0])
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / num)).all()


def allowed_entries(actions: FactoredDistribution, drawn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether each head's choice is allowed after the choices before it, ``[B, H]``, head by head."""
    allowed = []
    for place, head in enumerate(actions.heads):
        table = mask[:, head.outputs].view(-1, *head.shape)
        index = [drawn[:, before] for before in (*head.given, place)]
        allowed.append(table[(torch.arange(len(drawn)), *index)])
    return torch.stack(allowed, 1)


@pytest.mark.parametrize(("exploration", "num_batches"), [(0.0, 10), (0.2, 2)])
def test_a_million_samples_are_never_forbidden(
    growth_heads: Any, generator: torch.Generator, exploration: float, num_batches: int
) -> None:
    actions = distribution(SIZES, growth_heads, exploration)
    assert isinstance(actions, FactoredDistribution)
    for _ in range(num_batches):
        outputs = torch.randn(100_000, actions.num_outputs, generator=generator) * 8
        mask = reachable_mask(actions, generator, len(outputs))
        drawn, log_prob_BH = actions.sample(outputs, actions.noise((len(outputs),), generator), mask)
        assert allowed_entries(actions, drawn, mask).all()
        assert (log_prob_BH > -300).all()


@pytest.mark.parametrize("value", [0.0, float("inf"), -float("inf"), float("nan"), 3e38, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [None, 30_000.0])
def test_extreme_noise_and_outputs_never_draw_a_forbidden_choice(
    growth_heads: Any, generator: torch.Generator, value: float, dtype: torch.dtype, size: float | None
) -> None:
    for actions in (distribution(SIZES, growth_heads), distribution(SIZES), make(Discrete(5))):
        outputs = torch.randn(200, actions.num_outputs, generator=generator)
        outputs = (outputs if size is None else outputs.sign() * size).to(dtype)
        mask = reachable_mask(actions, generator, 200)
        noise = torch.full_like(actions.noise((200,), generator), value)
        assert isinstance(actions, FactoredDistribution)
        for drawn in (actions.sample(outputs, noise, mask)[0], actions.mode(outputs, mask)):
            assert allowed_entries(actions, drawn.view(200, -1), mask).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exploration", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_forbidden_logits_get_no_gradient_and_all_is_finite(
    growth_heads: Any, generator: torch.Generator, dtype: torch.dtype, exploration: float, scale: float
) -> None:
    for actions in (distribution(SIZES, growth_heads, exploration), distribution((4, 3), None, exploration)):
        outputs = (torch.randn(300, actions.num_outputs, generator=generator) * scale).to(dtype).requires_grad_()
        mask = reachable_mask(actions, generator, 300)
        drawn, _ = actions.sample(outputs.detach(), actions.noise((300,), generator), mask)
        result = actions.evaluate(outputs, drawn, mask)
        assert result.log_prob_BH.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert result.log_prob_BH.isfinite().all() and result.entropy_BH.isfinite().all()
        kl_B = actions.kl((outputs.detach() * 0.5), outputs, mask)
        (result.log_prob_BH.sum() + 7 * result.entropy_BH.sum() + kl_B.sum()).backward()
        gradient = outputs.grad
        assert gradient is not None and gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()
        if scale == 1.0:
            assert (gradient[mask] != 0).any()


def test_gradients_match_finite_differences(growth_heads: Any, generator: torch.Generator) -> None:
    for exploration in (0.0, 0.3):
        actions = distribution(SIZES, growth_heads, exploration)
        outputs = torch.randn(6, actions.num_outputs, generator=generator, dtype=torch.float64, requires_grad=True)
        mask = reachable_mask(actions, generator, 6)
        drawn, _ = actions.sample(outputs.detach(), actions.noise((6,), generator), mask)

        def log_prob_and_entropy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            result = actions.evaluate(x, drawn, mask)  # noqa: B023 (called at once)
            return result.log_prob_BH, result.entropy_BH

        assert torch.autograd.gradcheck(log_prob_and_entropy, (outputs,))
        old = torch.randn_like(outputs)
        assert torch.autograd.gradcheck(lambda x: actions.kl(old, x, mask), (outputs,))  # noqa: B023


def test_an_irrelevant_head_takes_its_first_valid_choice_without_probability(growth_heads: Any) -> None:
    actions = distribution(SIZES, growth_heads)
    outputs = torch.zeros(4, actions.num_outputs, requires_grad=True)
    value = {"op": np.tile([True, False, False], (4, 1)), "slot": np.tile([False, True], (4, 3, 1))}
    mask = torch.from_numpy(actions.flatten_mask(value, 4))
    drawn, log_prob_BH = actions.sample(outputs, actions.noise((4,), torch.Generator()), mask)
    assert drawn.tolist() == [[0, 1, 0]] * 4
    assert (log_prob_BH == 0).all()
    result = actions.evaluate(outputs, drawn, mask)
    assert result.relevant_BH is not None and result.relevant_BH.tolist() == [[True, False, False]] * 4
    result.log_prob_BH[:, 1:].sum().backward()
    assert outputs.grad is not None and (outputs.grad == 0).all()


def test_an_irrelevant_heads_entropy_still_has_a_gradient(growth_heads: Any, generator: torch.Generator) -> None:
    actions = distribution(SIZES, growth_heads)
    outputs = torch.randn(1, actions.num_outputs, generator=generator, requires_grad=True)
    actions.evaluate(outputs, torch.tensor([[0, 0, 0]])).entropy_BH.sum().backward()
    assert outputs.grad is not None
    assert (outputs.grad[0, 3:5] != 0).all(), "slot after op 0"
    assert (outputs.grad[0, 9:13] != 0).all(), "blueprint after op 0 and slot 0"
    assert (outputs.grad[0, 13:] == 0).all(), "rows of choices that were not drawn"


def test_an_empty_row_of_an_irrelevant_head_is_harmless(growth_heads: Any) -> None:
    actions = distribution(SIZES, growth_heads)
    outputs = torch.randn(2, actions.num_outputs, requires_grad=True)
    value = {"op": np.tile([True, False, False], (2, 1)), "slot": np.zeros((2, 3, 2), bool)}
    mask_NM = actions.flatten_mask(value, 2)
    actions.check_mask(mask_NM)
    mask = torch.from_numpy(mask_NM)
    drawn, _ = actions.sample(outputs, actions.noise((2,), torch.Generator()), mask)
    result = actions.evaluate(outputs, drawn, mask)
    assert drawn.tolist() == [[0, 0, 0]] * 2
    assert (result.entropy_BH[:, 1] == 0).all()
    result.entropy_BH[:, 1].sum().backward()
    assert outputs.grad is not None and (outputs.grad == 0).all()


def test_a_head_decided_by_an_irrelevant_head_is_irrelevant(enumeration: Any) -> None:
    heads = (
        HeadConfig(name="a"),
        HeadConfig(name="b", relevant_when={"a": (1,)}),
        HeadConfig(name="c", relevant_when={"b": (0,)}),
    )
    actions = distribution((2, 2, 2), heads)
    relevant_BH = actions.evaluate(torch.zeros(3, 6), torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]])).relevant_BH
    assert relevant_BH is not None
    assert relevant_BH.tolist() == [[True, False, False], [True, True, True], [True, True, False]]


@pytest.mark.parametrize("size", [2, 7, 40])
def test_one_head_is_the_plain_categorical(size: int, generator: torch.Generator) -> None:
    actions = make(Discrete(size))
    old, new = torch.randn(2, 50, size, generator=generator)
    drawn, log_prob_BH = actions.sample(old, actions.noise((50,), generator))
    assert drawn.shape == (50,) and log_prob_BH.shape == (50, 1)
    categorical = torch.distributions.Categorical(logits=old)
    result = actions.evaluate(old, drawn)
    torch.testing.assert_close(result.log_prob_BH[:, 0], categorical.log_prob(drawn))
    torch.testing.assert_close(result.entropy_B, categorical.entropy())
    expected = torch.distributions.kl_divergence(categorical, torch.distributions.Categorical(logits=new))
    torch.testing.assert_close(actions.kl(old, new), expected)
    assert torch.equal(actions.mode(old), old.argmax(1))
    assert result.relevant_BH is None


def test_exploration_keeps_a_gradient_for_a_choice_that_is_all_but_impossible() -> None:
    outputs = torch.tensor([[0.0, 12.0, -12.0]], requires_grad=True)
    actions = make(Discrete(3), ActionConfig(exploration=0.1))
    result = actions.evaluate(outputs, torch.tensor([2]))
    assert result.log_prob_BH.item() == pytest.approx(np.log(0.1 / 3), rel=1e-5)
    result.log_prob_BH.sum().backward()
    assert outputs.grad is not None and (outputs.grad != 0).all()


def test_an_environments_action_depends_on_its_own_noise_alone(growth_heads: Any, generator: torch.Generator) -> None:
    actions = distribution(SIZES, growth_heads, 0.1)
    outputs = torch.randn(8, actions.num_outputs, generator=generator)
    noise = actions.noise((5, 8), generator)
    assert noise.shape[:2] == (5, 8)
    before, _ = actions.sample(outputs, noise[0])
    noise[0, 0], outputs[0] = noise[0, 0].flip(0), -outputs[0]
    after, _ = actions.sample(outputs, noise[0])
    assert torch.equal(before[1:], after[1:])


def test_mode_is_greedy_in_order(enumeration: Any, growth_heads: Any) -> None:
    actions = distribution(SIZES, growth_heads)
    outputs = torch.zeros(1, actions.num_outputs)
    outputs[0, 1] = 1.0  # op 1
    outputs[0, 3 + 2 * 1 + 1] = 1.0  # slot 1 after op 1
    outputs[0, 9 + 4 * (2 * 1 + 1) + 2] = 1.0  # blueprint 2 after op 1 and slot 1
    assert actions.mode(outputs).tolist() == [[1, 1, 2]]
    mask = np.ones((1, actions.mask_width), bool)
    mask[0, 1] = False
    assert actions.mode(outputs, torch.from_numpy(mask)).tolist() == [[0, 0, 0]]


def test_there_is_nothing_to_save_and_tables_follow_the_module(growth_heads: Any) -> None:
    actions = distribution(SIZES, growth_heads)
    assert not actions.state_dict() and not list(actions.parameters())
    assert all(buffer.device.type == "meta" for buffer in actions.to("meta").buffers())


def test_autocast_does_not_touch_the_kl(generator: torch.Generator) -> None:
    heads = (HeadConfig(name="a"), HeadConfig(name="b", given=("a",)), HeadConfig(name="c", given=("b",)))
    actions = distribution((5, 4, 3), heads)  # the chance of b sums over a, a product of matrices
    old, new = torch.randn(2, 9, actions.num_outputs, generator=generator)
    expected = actions.kl(old, new)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(actions.kl(old, new), expected)


@pytest.mark.parametrize("exploration", [0.0, 0.2])
def test_a_forbidden_logit_counts_for_nothing_however_large(exploration: float, growth_heads: Any) -> None:
    actions = distribution(SIZES, growth_heads, exploration)
    mask = torch.ones(1, actions.mask_width, dtype=torch.bool)
    mask[0, 0] = False
    outputs = torch.full((1, actions.num_outputs), -60_000.0, dtype=torch.float16)
    outputs[0, 0] = 60_000.0
    result = actions.evaluate(outputs, torch.tensor([[1, 0, 0]]), mask)
    torch.testing.assert_close(result.log_prob_BH, -torch.tensor([[2.0, 2.0, 4.0]]).log())
    torch.testing.assert_close(result.entropy_BH, torch.tensor([[2.0, 2.0, 4.0]]).log())


def test_a_snapshot_is_refused() -> None:
    actions = make(Discrete(2))
    assert actions.snapshot() is None
    with pytest.raises(ValueError, match="`snapshot_old` must be None"):
        actions.kl(torch.zeros(1, 2), torch.zeros(1, 2), None, torch.zeros(1))
