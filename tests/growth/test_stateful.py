"""Any sequence of operations through the public API: stages and alpha stay legal, and the run stays sound."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import nn

from morphogen.errors import SlotError
from morphogen.growth import Sowing, Stage
from morphogen.growth.lifecycle import ACTING, LIVE, NEXT_STAGE, OPERATORS, SlotState
from morphogen.growth.ramps import CURVES
from morphogen.growth.topology import read_topology
from morphogen.state import draw_from
from morphogen.testing import LENIENT, HostCase


class PairCase(HostCase):
    """A host whose second growth point holds two layers with hidden units between."""

    def build(self, seed: int = 0) -> nn.Module:
        host = super().build(seed)
        with draw_from(torch.Generator().manual_seed(seed + 1)):
            host.body = nn.Sequential(nn.Linear(self.width, 5), nn.GELU(), nn.Linear(5, self.width))
        return host


CASE = PairCase("NLC")
FOLDABLE = {"early": {"norm"}, "late": {"low_rank", "norm", "widen"}}
CONFIG = LENIENT.replace(pruned_ticks=1, embargo_ticks=1, resetting_ticks=1)
LEGAL_MOVES = {
    Stage.DORMANT: {Stage.GERMINATED},
    Stage.GERMINATED: {Stage.TRAINING, Stage.PRUNED},
    Stage.TRAINING: {Stage.BLENDING, Stage.PRUNED},
    Stage.BLENDING: {Stage.HOLDING, Stage.PRUNED},
    Stage.HOLDING: {Stage.BLENDING, Stage.FOSSILIZED, Stage.PRUNED},
    Stage.FOSSILIZED: {Stage.PRUNED, Stage.DORMANT},
    Stage.PRUNED: {Stage.EMBARGOED},
    Stage.EMBARGOED: {Stage.RESETTING},
    Stage.RESETTING: {Stage.DORMANT},
}
slots = st.sampled_from(["early", "late"])
ticks = st.integers(0, 3)
alphas = st.sampled_from([0.3, 0.7, 1.0])


@dataclasses.dataclass
class Saved:
    """A snapshot, and what was in the run."""

    snapshot: Any
    contents: dict[str, Any]


class Growth(RuleBasedStateMachine):
    """Every operation, legal or not, on two slots of one run."""

    kit: Any

    @initialize(
        optimizer=st.sampled_from(["adam", "sgd"]),
        freeze=st.booleans(),
        early=st.sampled_from(Stage),
        late=st.sampled_from(Stage),
        seed=st.sampled_from([("mlp", "gate"), ("norm", "add")]),
    )
    def start(self, optimizer: str, freeze: bool, early: Stage, late: Stage, seed: tuple[str, Any]) -> None:
        self.config = CONFIG.replace(freeze_fossils=freeze)
        self.optimizer = optimizer
        self.run = self.kit.run(CASE, optimizer, self.config)
        self.saved: list[Saved] = []
        for slot, stage in (("early", early), ("late", late)):
            if stage is not Stage.DORMANT:
                self.run.sow(slot, seed[0], stage, operator=seed[1])
        self.run.step()
        self.before = self.states()

    def states(self) -> dict[str, SlotState]:
        return {name: self.run.model.slot(name).state for name in self.run.model.stages()}

    def attempt(self, slot: str, legal: bool, operation: Callable[[], Any]) -> Any:
        """Do it if it is legal; else it has to raise and to change nothing."""
        if legal:
            return operation()
        before = self.signature()
        with pytest.raises(SlotError, match=f"slot '{slot}'"):
            operation()
        assert self.signature() == before
        return None

    def signature(self) -> tuple[Any, ...]:
        model = self.run.model
        return self.states(), model.clock, sorted(self.run.members()), [id(p) for p in model.parameters()]

    @rule(
        slot=slots,
        blueprint=st.sampled_from(["low_rank", "mlp", "norm", "widen"]),
        operator=st.sampled_from(OPERATORS),
        over=ticks,
    )
    def germinate(self, slot: str, blueprint: str, operator: Any, over: int) -> None:
        options = {"units": 2} if blueprint == "widen" else {}
        sowing = Sowing(blueprint=blueprint, operator=operator, blend_ticks=max(1, over), options=options)
        legal = self.run.model.stages()[slot] is Stage.DORMANT and (blueprint != "widen" or slot == "late")
        self.attempt(slot, legal, lambda: self.run.model.germinate(slot, sowing))

    @rule(slot=slots)
    def advance(self, slot: str) -> None:
        state = self.states()[slot]
        gate = self.attempt(slot, state.stage in NEXT_STAGE and not state.is_pruning, lambda: self.run.model.advance(slot))
        if gate is not None:
            after = self.run.model.stages()[slot]
            assert after is (NEXT_STAGE[state.stage] if gate else state.stage)

    @rule(slot=slots, alpha=alphas, over=ticks, curve=st.sampled_from(CURVES))
    def retarget(self, slot: str, alpha: float, over: int, curve: Any) -> None:
        legal = self.run.model.stages()[slot] in (Stage.BLENDING, Stage.HOLDING)
        self.attempt(slot, legal, lambda: self.run.model.set_alpha_target(slot, alpha, over=over, curve=curve))
        if legal:
            assert not self.states()[slot].is_pruning

    @rule(slot=slots, over=ticks)
    def prune(self, slot: str, over: int) -> None:
        legal = self.run.model.stages()[slot] in LIVE
        self.attempt(slot, legal, lambda: self.run.model.prune(slot, over=over, reason="test"))
        if legal:
            assert self.states()[slot].is_pruning or self.run.model.stages()[slot] is Stage.PRUNED

    @rule(slot=slots, measured=st.booleans())
    def fossilize(self, slot: str, measured: bool) -> None:
        legal = self.run.model.stages()[slot] is Stage.HOLDING
        if legal and measured:
            self.run.model.record_contribution(slot, 0.1, 0.01)
        self.attempt(slot, legal, lambda: self.run.model.fossilize(slot))

    @rule(slot=slots)
    def excise(self, slot: str) -> None:
        legal = self.run.model.stages()[slot] is Stage.FOSSILIZED
        self.attempt(slot, legal, lambda: self.run.model.excise(slot))

    @rule(slot=slots)
    def merge(self, slot: str) -> None:
        state, model = self.states()[slot], self.run.model
        foldable = state.operator == "add" and state.blueprint in FOLDABLE[slot]
        inputs = CASE.example(seed=5)
        expected = copy.deepcopy(model).eval()(inputs).detach()
        self.attempt(slot, state.stage is Stage.FOSSILIZED and foldable, lambda: model.merge(slot))
        torch.testing.assert_close(copy.deepcopy(model).eval()(inputs).detach(), expected, rtol=1e-4, atol=1e-5)

    @rule(blueprint=st.sampled_from(["low_rank", "norm", "widen"]), alpha=alphas)
    def grow_for_good(self, blueprint: str, alpha: float) -> None:
        """Lead a seed to where it can be merged, so that this is reached often."""
        if self.run.model.stages()["late"] is Stage.DORMANT:
            self.run.sow("late", blueprint, Stage.FOSSILIZED, alpha_target=alpha)

    @rule(count=st.integers(1, 3))
    def tick(self, count: int) -> None:
        for _ in range(count):
            before, clock = self.run.model.stages(), self.run.model.clock
            changed = self.run.model.tick()
            after = self.run.model.stages()
            assert changed == {name: stage for name, stage in after.items() if stage is not before[name]}
            assert self.run.model.clock == clock + 1

    @rule()
    def train(self) -> None:
        self.run.step()

    @rule(slot=slots)
    def hurry(self, slot: str) -> None:
        """Train and advance, so that later stages are reached often."""
        self.run.step()
        self.run.model.tick()
        state = self.states()[slot]
        if state.stage in NEXT_STAGE and not state.is_pruning:
            self.run.model.advance(slot)

    @rule()
    def capture(self) -> None:
        self.saved.append(Saved(self.run.state.capture(), self.run.contents()))

    @precondition(lambda self: self.saved)
    @rule(index=st.integers(0, 100))
    def restore(self, index: int) -> None:
        saved = self.saved[index % len(self.saved)]
        self.run.state.restore(saved.snapshot)
        after = self.run.contents()
        assert set(self.kit.differences(saved.contents, after)) <= {"identity", "gradients"}
        self.before = self.states()

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh: bool) -> None:
        before = self.run.contents()
        with tempfile.TemporaryDirectory() as directory:
            self.run.state.save(directory)
            if fresh:
                self.run = self.kit.run(CASE, self.optimizer, self.config)
                self.saved.clear()
            self.run.state.load(directory)
        after = self.run.contents()
        assert set(self.kit.differences(before, after)) <= {"identity", "gradients", "hooks"}
        self.before = self.states()

    @rule()
    def go_on_with_a_copy(self) -> None:
        """A deep copy is the same model; the run does not follow it, so only the copy is looked at."""
        twin = copy.deepcopy(self.run.model)
        assert twin.topology() == self.run.model.topology()
        inputs = CASE.example()
        assert self.kit.same(twin(inputs).detach(), self.run.model(inputs).detach())

    @invariant()
    def every_move_was_legal(self) -> None:
        for name, state in self.states().items():
            known = {id(transition) for transition in self.before[name].history}
            fresh = [transition for transition in state.history if id(transition) not in known]
            stage = self.before[name].stage
            for transition in fresh:
                assert transition.previous is stage and transition.stage in LEGAL_MOVES[stage]
                stage = transition.stage
            assert stage is state.stage
        self.before = self.states()

    @invariant()
    def states_are_consistent(self) -> None:
        for name, state in self.states().items():
            slot = self.run.model.slot(name)
            assert 0.0 <= state.alpha <= 1.0
            assert state.alpha > 0.0 or state.stage not in ACTING
            assert state.alpha == 0.0 or state.stage in ACTING
            assert float(slot.alpha) == pytest.approx(state.alpha, abs=1e-6)
            assert (state.ramp is None) or state.stage is Stage.BLENDING
            assert state.stage not in (Stage.HOLDING, Stage.FOSSILIZED) or state.alpha == state.alpha_target
            assert (slot.seed is not None) == state.has_seed == (state.stage in LIVE | {Stage.FOSSILIZED})
            assert state.frozen == (state.stage is Stage.FOSSILIZED and self.config.freeze_fossils)
            assert state.has_seed or slot.sensors == type(slot.sensors)()

    @invariant()
    def the_optimizer_holds_what_is_owned(self) -> None:
        assert self.run.members() == self.run.owned()
        assert {id(parameter) for parameter in self.run.optimizer.state} <= self.run.members()
        self.run.state.verify()

    @invariant()
    def without_an_acting_seed_the_output_is_the_hosts(self) -> None:
        if any(state.stage in ACTING for state in self.states().values()):
            return
        bare = CASE.build()
        for path, part in self.run.model.host.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(bare.get_submodule(path), name, nn.Parameter(parameter.detach().clone()))
        inputs = CASE.example(seed=4)
        assert self.kit.same(self.run.model(inputs).detach(), bare(inputs).detach())

    @invariant()
    def the_structure_is_data(self) -> None:
        model = self.run.model
        clock, records = read_topology(model.topology(), {name: model.slot(name).site for name in model.stages()})
        assert clock == model.clock
        assert {name: record.state for name, record in records.items()} == self.states()
        assert {name: record.sensors for name, record in records.items()} == {
            name: model.slot(name).sensors for name in model.stages()
        }


def explore(kit: Any, examples: int, steps: int) -> None:
    torch.manual_seed(0)
    Growth.kit = kit
    run_state_machine_as_test(
        Growth,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_any_sequence_of_operations(kit: Any) -> None:
    explore(kit, 40, 20)


@pytest.mark.slow
def test_many_long_sequences_of_operations(kit: Any) -> None:
    explore(kit, 400, 60)
