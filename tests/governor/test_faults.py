"""Faults to inject: written as text, equal for equal seeds, and found by a governor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphogen.governor import Action
from morphogen.governor.faults import KINDS, Fault, damage, poisoned


def test_a_fault_is_written_as_kind_at_step() -> None:
    assert Fault.parse("nan@300") == Fault(300, "nan") and Fault.parse("spike@0") == Fault(0, "spike")
    assert sorted([Fault(9, "nan"), Fault(2, "spike")]) == [Fault(2, "spike"), Fault(9, "nan")]


@pytest.mark.parametrize("text", ["nan", "nan@", "@3", "nan@-1", "nan@1.5", "nan@3@4", "NaN@3", "flood@3", "", "nan@ 3"])
def test_what_is_written_otherwise_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="a fault must be written as nan@STEP or spike@STEP, got"):
        Fault.parse(text)


def test_every_kind_is_described() -> None:
    assert set(KINDS) == {"nan", "spike"} and all(len(text) > 20 for text in KINDS.values())


def test_poisoned_inputs_have_the_same_form(kit: Any) -> None:
    inputs = torch.ones(3, 4, dtype=torch.float64)
    found = poisoned(inputs)
    assert found.shape == inputs.shape and found.dtype == inputs.dtype and bool(found.isnan().all())
    assert not inputs.isnan().any()


def test_damage_is_drawn_from_the_generator_it_is_given(kit: Any) -> None:
    first, second = kit.small_model(), kit.small_model()
    chance = torch.get_rng_state()
    for model in (first, second):
        damage(model, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), chance)
    assert kit.differences(kit.contents(first), kit.contents(second)) == []
    before = dict(kit.small_model().named_parameters())
    for name, parameter in first.named_parameters():
        moved = (parameter - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert 1.0 < float(moved.detach()) < 6.0, "about three times its own size"


def test_a_governor_recovers_from_each(kit: Any) -> None:
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(130)
    assert loop.step(inputs=poisoned).action is Action.REWIND
    loop.steps(60)
    damage(loop.model, torch.Generator().manual_seed(3))
    loop.steps_until("rewind", 8)
    assert all(verdict.proceed for verdict in loop.steps(40))
    assert [rollback.findings[0].detector for rollback in loop.rollbacks] == ["non_finite", "explosion"]
