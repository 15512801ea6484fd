"""Masks are exact on a real model with a real optimizer: what they allow happens, what they mask changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from morphogen.control import Action, Op, SlotView, action_mask, execute, view_slots
from morphogen.errors import SlotError
from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, Sowing, Stage
from morphogen.growth.lifecycle import NEXT_STAGE
from morphogen.state import TrainingState
from morphogen.testing import LENIENT, HostCase

CASE = HostCase("NC", width=4)
SLOTS = ("early", "late")
SOWING = Sowing(blueprint="low_rank", blend_ticks=2)
CONFIGS = (
    LENIENT,
    GrowthConfig(embargo_ticks=0, gates=GateConfig(min_training_ticks=1, min_blending_ticks=1, min_contribution=0.1)),
    GrowthConfig(
        pruned_ticks=1,
        embargo_ticks=1,
        gates=GateConfig(
            min_training_ticks=1, min_blending_ticks=1, min_gradient_ratio=0.1, min_contribution=0.1, contribution_z=5.0
        ),
    ),
)


class Run:
    """A small growable model in training."""

    def __init__(self, config: GrowthConfig) -> None:
        self.model: GrowableModel = CASE.model(config=config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.state = TrainingState(self.model, self.optimizer)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(CASE.example()).square().mean().backward()
        self.model.sense()
        self.optimizer.step()

    def contents(self) -> dict[str, Any]:
        """Everything an action may change, copied without the help of the code under test."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        tensors = {name: value.detach().clone() for name, value in self.model.state_dict(keep_vars=True).items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"{names.get(id(parameter), 'gone')} {key}"] = copy.deepcopy(value)
        groups = [[names.get(id(p), "gone") for p in group["params"]] for group in self.optimizer.param_groups]
        slots = {name: (self.model.slot(name).state, self.model.slot(name).sensors) for name in SLOTS}
        return {"tensors": tensors, "groups": groups, "slots": slots, "clock": self.model.clock}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    ours, theirs = left["tensors"], right["tensors"]
    return (
        [left[key] for key in ("groups", "slots", "clock")] == [right[key] for key in ("groups", "slots", "clock")]
        and list(ours) == list(theirs)
        and all(_same_bits(value, theirs[name]) for name, value in ours.items())
    )


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.numpy().tobytes() == right.numpy().tobytes()


def every_action() -> Iterator[Action]:
    for slot in SLOTS:
        yield Action(op=Op.GERMINATE, slot=slot, sowing=SOWING)
        yield Action(op=Op.ADVANCE, slot=slot)
        yield Action(op=Op.SET_ALPHA_TARGET, slot=slot, alpha_target=0.6, over=2)
        yield Action(op=Op.PRUNE, slot=slot, over=2)
        yield Action(op=Op.FOSSILIZE, slot=slot)


ACTIONS = tuple(every_action())


def promised(action: Action, view: SlotView) -> tuple[Stage, ...]:
    """The stages in which an allowed action may leave its slot."""
    if action.op is Op.GERMINATE:
        return (Stage.GERMINATED,)
    if action.op is Op.ADVANCE:
        return (NEXT_STAGE[view.stage],)
    if action.op is Op.FOSSILIZE:
        return (Stage.FOSSILIZED,)
    if action.op is Op.SET_ALPHA_TARGET:
        return (Stage.BLENDING,)
    blended = view.stage in (Stage.BLENDING, Stage.HOLDING) and view.alpha > 0.0
    return (Stage.BLENDING,) if blended and action.over else (Stage.PRUNED,)


decisions = st.lists(
    st.tuples(
        st.sampled_from(["train", "judge", "tick", "act", "act", "act"]), st.integers(0, len(ACTIONS) - 1), st.booleans()
    ),
    min_size=20,
    max_size=60,
)


@given(st.sampled_from(CONFIGS), decisions)
@settings(max_examples=40, deadline=None)
def test_an_allowed_action_happens_as_promised_and_a_masked_one_changes_nothing(
    config: GrowthConfig, walk: list[tuple[str, int, bool]]
) -> None:
    run = Run(config)
    for what, number, seize in walk:
        if what == "train":
            run.train()
        elif what == "tick":
            run.model.tick()
        elif what == "judge":
            for slot, stage in run.model.stages().items():
                if stage in (Stage.BLENDING, Stage.HOLDING):
                    run.model.record_contribution(slot, 0.2 if seize else 0.05, 0.01)
        else:
            act(run, ACTIONS[number], seize)
    run.state.verify()


def act(run: Run, action: Action, seize: bool) -> None:
    """Try ``action``; if it is masked and ``seize``, do something possible instead, so that walks go far."""
    mask = action_mask(view_slots(run.model))
    if not mask.allows(action):
        before = run.contents()
        with pytest.raises(SlotError):
            execute(run.model, action)
        assert same(run.contents(), before), f"masked {action} changed something"
        possible = [other for other in ACTIONS if mask.allows(other) and other.op is not Op.PRUNE]
        if not seize or not possible:
            return
        action = possible[0]
    view = next(view for view in view_slots(run.model) if view.name == action.slot)
    execute(run.model, action)
    assert run.model.stages()[action.slot or ""] in promised(action, view), action
    members = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert members == {id(parameter) for pairs in run.model.owners().values() for _, parameter in pairs}


def test_the_walks_go_through_every_stage() -> None:
    """The property above is worth nothing if most stages are never met."""
    seen: set[Stage] = set()
    for config in CONFIGS:
        run = Run(config)
        chance = torch.Generator().manual_seed(0)
        for _ in range(150):
            run.train()
            for slot, stage in run.model.stages().items():
                if stage is Stage.HOLDING:
                    run.model.record_contribution(slot, 0.2, 0.01)
            act(run, ACTIONS[int(torch.randint(len(ACTIONS), (1,), generator=chance))], True)
            run.model.tick()
            seen |= set(run.model.stages().values())
            if all(stage is Stage.FOSSILIZED for stage in run.model.stages().values()):
                run = Run(config)
    assert seen == set(Stage)


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("gate_open", [True, False])
def test_the_mask_of_each_stage(stage: Stage, gate_open: bool) -> None:
    """The whole table; a gate that is open shows in ADVANCE before HOLDING and in FOSSILIZE there."""
    live = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
    view = SlotView(
        name="s",
        stage=stage,
        ticks_in_stage=3,
        alpha=0.5,
        at_rest=True,
        is_pruning=False,
        gate_open=gate_open and stage in live,
        blueprint=None,
        tried=(),
        contribution=None,
        contribution_error=None,
    )
    expected = {Op.WAIT}
    expected |= {Op.GERMINATE} if stage is Stage.DORMANT else set()
    expected |= {Op.ADVANCE} if gate_open and stage in live[:3] else set()
    expected |= {Op.FOSSILIZE} if gate_open and stage is Stage.HOLDING else set()
    expected |= {Op.SET_ALPHA_TARGET} if stage in (Stage.BLENDING, Stage.HOLDING) else set()
    expected |= {Op.PRUNE} if stage in live else set()
    assert set(action_mask([view]).ops) == expected
