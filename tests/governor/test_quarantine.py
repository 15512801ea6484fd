"""A seed that does not act yet and is at fault is taken out; the host never notices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from morphogen.governor import Action, Governor, GovernorConfig, Rollback, StepSkipped
from morphogen.governor.consensus import Consensus
from morphogen.governor.events import PartQuarantined
from morphogen.governor.quarantine import isolated_parameters, quarantine_faulty
from morphogen.growth import GrowableModel, Stage
from morphogen.state import TrainingState
from morphogen.state.topology import Isolating
from morphogen.testing import LENIENT, HostCase, lead_to

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=20, penalty=7.0, quarantine_penalty=0.25)
HALVES = ("early", "late")


class Run:
    """A growable model under a governor, and what its steps said."""

    def __init__(self, seeds: dict[str, Stage] | None = None, config: GovernorConfig = CONFIG, scaler: Any = None) -> None:
        self.case = HostCase("NC")
        self.model: GrowableModel = self.case.model(config=LENIENT)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.data = torch.Generator().manual_seed(1)
        self.scaler = scaler
        self.state = TrainingState(self.model, self.optimizer, scaler=scaler, extras={"data": self.data})
        for slot, stage in (seeds or {}).items():
            before = copy.deepcopy(self.model.host.state_dict())
            self.model.germinate(slot, "low_rank")
            lead_to(self.model, slot, stage, self.case.example())
            self.model.host.load_state_dict(before)
        self.events: list[Any] = []
        self.governor = Governor(self.state, config, emit=self.events.append)

    def step(self, spoil: Callable[[Run], None] | None = None, norm: bool = False, loss_factor: float = 1.0) -> Any:
        inputs = torch.randn(self.case.example(num_samples=16).shape, generator=self.data)
        self.optimizer.zero_grad()
        loss = loss_factor * functional.mse_loss(self.model(inputs), inputs[:, :3].sin())
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if spoil is not None:
            spoil(self)
        given = torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm() if norm else None
        verdict = self.governor.observe(loss, grad_norm=given)
        if verdict.proceed and self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif verdict.proceed:
            self.optimizer.step()
        return verdict

    def steps(self, count: int, **options: Any) -> None:
        for _ in range(count):
            assert self.step(**options).proceed

    def host(self, kit: Any) -> dict[str, Any]:
        """Weights, buffers and moments of the host."""
        host = self.model.host
        found = kit.contents(host, self.optimizer)
        return {name: value for name, value in found.items() if "gone" not in name and "rates" not in name}

    def seed(self, slot: str = "early") -> list[nn.Parameter]:
        return [parameter for _, parameter in self.model.owners()[slot]]


def weights_are_nan(run: Run, slot: str = "early") -> None:
    run.seed(slot)[0].data.view(-1)[0] = math.nan


def gradients_are_nan(run: Run, slot: str = "early") -> None:
    run.seed(slot)[-1].grad.view(-1)[0] = math.nan


def gradients_are_infinite(run: Run, slot: str = "early") -> None:
    run.seed(slot)[0].grad.fill_(math.inf)


FAULTS = (weights_are_nan, gradients_are_nan, gradients_are_infinite)


def test_what_is_isolated_are_the_seeds_in_incubation() -> None:
    run = Run({"early": Stage.TRAINING, "late": Stage.BLENDING})
    assert isinstance(run.model, Isolating) and not isinstance(run.model.host, Isolating)
    assert list(run.model.isolated()) == ["early"]
    assert [id(parameter) for parameter in isolated_parameters([run.model])] == list(map(id, run.seed()))
    lead_to(run.model, "early", Stage.BLENDING, run.case.example())
    assert run.model.isolated() == {}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seed_at_fault_is_gone_and_the_host_goes_on_to_the_bit(kit: Any, fault: Any, norm: bool) -> None:
    run, free = Run({"early": Stage.TRAINING}), Run()
    for each in (run, free):
        each.steps(30, norm=norm)
    assert kit.differences(run.host(kit), free.host(kit)) == [], "the seed does not act"
    seed = run.seed()
    verdict = run.step(spoil=fault, norm=norm and fault is not weights_are_nan)
    if fault is weights_are_nan:  # its output in this pass was finite; its gradients are not in the next
        verdict = run.step(norm=norm) if not verdict.quarantined else verdict
        free.step()
    free.step()
    assert verdict.proceed and verdict.quarantined == ("early",)
    assert run.model.stages()["early"] is Stage.PRUNED and run.governor.skipped_steps == run.governor.rollbacks == 0
    assert not any(parameter in run.optimizer.state for parameter in seed)
    run.steps(20, norm=norm)
    free.steps(20, norm=norm)
    assert kit.differences(run.host(kit), free.host(kit)) == []
    run.state.verify()


def test_what_is_said_and_what_it_costs(kit: Any) -> None:
    run = Run({"early": Stage.TRAINING})
    run.steps(5)
    verdict = run.step(spoil=gradients_are_nan)
    assert len(run.events) == 1 and len(verdict.penalties) == 1 and len(verdict.findings) == 1
    event, penalty, finding = run.events[0], verdict.penalties[0], verdict.findings[0]
    assert isinstance(event, PartQuarantined) and event.findings == (finding,) and finding.detector == "quarantine"
    assert (event.step, event.owner, event.penalty) == (5, "early", 0.25)
    assert (penalty.step, penalty.owner, penalty.amount, penalty.ends_episode) == (5, "early", 0.25, False)
    assert penalty.reason == finding.message and "'early'" in finding.message
    assert run.step().penalties == () and run.step().quarantined == ()


def test_two_seeds_at_fault_go_together_and_a_sound_one_stays(kit: Any) -> None:
    run = Run(dict.fromkeys(HALVES, Stage.TRAINING))
    run.steps(5)
    verdict = run.step(spoil=lambda run: gradients_are_nan(run, "late"))
    assert verdict.quarantined == ("late",) and run.model.stages()["early"] is Stage.TRAINING
    run = Run(dict.fromkeys(HALVES, Stage.TRAINING))
    run.steps(5)
    verdict = run.step(spoil=lambda run: [gradients_are_nan(run, slot) for slot in HALVES] and None)
    assert verdict.proceed and verdict.quarantined == HALVES and len(run.events) == len(verdict.penalties) == 2


def test_a_fault_of_the_host_at_the_same_step_is_a_fault_still(kit: Any) -> None:
    def both(run: Run) -> None:
        gradients_are_nan(run)
        next(run.model.host.parameters()).grad.fill_(math.nan)

    for norm in (False, True):
        run = Run({"early": Stage.TRAINING})
        run.steps(5)
        before = run.host(kit)
        verdict = run.step(spoil=both, norm=norm)
        assert verdict.action is Action.SKIP and verdict.quarantined == ("early",)
        assert kit.differences(run.host(kit), before) == []
        assert [type(event) for event in run.events] == [StepSkipped, PartQuarantined]


def test_a_seed_that_acts_is_rewound_with_everything(kit: Any) -> None:
    run = Run({"early": Stage.BLENDING})
    run.steps(40)
    weights_are_nan(run)
    verdict = run.step()
    assert verdict.action is Action.REWIND and verdict.quarantined == ()
    assert run.model.stages()["early"] is Stage.BLENDING and kit.is_finite(kit.contents(run.model, run.optimizer))
    (penalty,) = verdict.penalties
    assert (penalty.amount, penalty.owner, penalty.ends_episode) == (7.0, None, True)
    assert penalty.reason == verdict.findings[0].message
    assert [event.penalty for event in run.events if isinstance(event, Rollback)] == [7.0]
    run.steps(10)


def test_a_seed_whose_gradients_explode_but_are_finite_does_not_alarm(kit: Any) -> None:
    """They stay apart from the norm that is judged."""
    run = Run({"early": Stage.TRAINING})
    run.steps(100)
    verdict = run.step(spoil=lambda run: [parameter.grad.mul_(1e6) for parameter in run.seed()] and None)
    assert verdict.proceed and verdict.findings == () and verdict.quarantined == ()


def test_finite_gradients_whose_norm_overflows_are_no_fault(kit: Any) -> None:
    run = Run({"early": Stage.TRAINING})
    run.steps(5)
    verdict = run.step(spoil=lambda run: [parameter.grad.fill_(3e38) for parameter in run.seed()] and None)
    assert verdict.proceed and verdict.quarantined == ()


def test_a_seed_thrown_out_can_be_planted_again_and_a_snapshot_with_it_is_no_trap(kit: Any) -> None:
    """A rewind to a snapshot of before brings the seed back as it was then: sound."""
    run = Run({"early": Stage.TRAINING})
    run.steps(40)
    assert run.step(spoil=gradients_are_nan).quarantined == ("early",)
    with torch.no_grad():
        next(run.model.host.parameters()).view(-1)[0] = math.nan
    assert run.step().action is Action.REWIND
    assert run.model.stages()["early"] is Stage.TRAINING
    assert kit.is_finite(kit.contents(run.model, run.optimizer))
    run.steps(10)


def test_a_seed_sick_in_a_snapshot_on_probation_spoils_no_more_than_that_snapshot(kit: Any) -> None:
    run = Run({"early": Stage.TRAINING})
    run.steps(45)
    weights_are_nan(run)  # not seen: no forward pass, and no gradient, since
    for _ in range(60):
        assert run.step().action is not Action.SKIP
    assert kit.is_finite(kit.contents(run.model, run.optimizer)) and run.governor.rollbacks <= 1


# -- with a gradient scaler that seeks its scale ---------------------------------------------------------------------------


def test_an_overflow_while_the_scale_is_sought_is_not_the_seeds_fault(kit: Any) -> None:
    run = Run({"early": Stage.TRAINING}, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    verdicts = [run.step(loss_factor=1e3) for _ in range(20)]
    assert all(verdict.quarantined == () for verdict in verdicts) and run.governor.rollbacks == 0
    assert verdicts[0].action is Action.SKIP and verdicts[-1].proceed
    assert run.model.stages()["early"] is Stage.TRAINING


def test_weights_of_a_seed_are_its_own_fault_whatever_the_scale(kit: Any) -> None:
    run = Run({"early": Stage.TRAINING}, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    run.steps(5)
    weights_are_nan(run)
    verdict = run.step()
    assert verdict.quarantined == ("early",)
    run.steps(5)


def test_a_seed_that_never_has_finite_gradients_is_taken_out_once_the_scale_cannot_be_the_reason(kit: Any) -> None:
    """Until then the scaler leaves out its steps, and those of the host with them; it goes on from a low scale."""
    run = Run({"early": Stage.TRAINING}, scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    run.steps(5)
    before = run.host(kit)

    def overflow(run: Run) -> None:  # as `unscale_` would have found it
        gradients_are_infinite(run)
        run.scaler._per_optimizer_states[id(run.optimizer)]["found_inf_per_device"][torch.device("cpu")].fill_(1.0)

    for expected_scale in (32.0, 16.0, 8.0, 4.0, 2.0, 1.0):
        assert run.step(spoil=overflow).quarantined == ()
        assert run.scaler.get_scale() == expected_scale
    statistics = ("running", "num_batches")
    changed = kit.differences(run.host(kit), before)
    assert all(any(word in name for word in statistics) for name in changed)
    assert run.step(spoil=overflow).quarantined == ("early",)
    run.steps(5)
    assert run.model.stages()["early"] is Stage.PRUNED and run.governor.rollbacks == 0


# -- by itself -----------------------------------------------------------------------------------------------------------


def test_only_isolated_parts_are_ever_taken_out() -> None:
    run = Run({"early": Stage.BLENDING, "late": Stage.TRAINING})
    weights_are_nan(run, "early")
    assert quarantine_faulty({"": run.model}, Consensus(), by_gradient=True) == []
    weights_are_nan(run, "late")
    assert quarantine_faulty({"": run.model, "plain": nn.Linear(2, 2)}, Consensus(), by_gradient=True) == ["late"]
    assert quarantine_faulty({"": run.model}, Consensus(), by_gradient=True) == []


def test_the_same_owner_in_two_models_is_taken_out_of_the_one_at_fault() -> None:
    runs = [Run({"early": Stage.TRAINING}) for _ in range(2)]
    weights_are_nan(runs[1])
    assert quarantine_faulty({"a": runs[0].model, "b": runs[1].model}, Consensus(), by_gradient=True) == ["early"]
    assert [run.model.stages()["early"] for run in runs] == [Stage.TRAINING, Stage.PRUNED]
