"""The conformance suite of policies: possible actions only, and no chance but what they are given.

Call :func:`check_policy` with what makes a policy of your own from blueprints::

    def test_policy():
        check_policy(lambda blueprints: MyPolicy(blueprints))
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from morphogen.control import Action, ActionMask, Observation, Op, Policy, action_mask, execute, view_slots
from morphogen.errors import SlotError
from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, Sowing, Stage, blueprints
from morphogen.growth.layouts import Layout
from morphogen.growth.lifecycle import OPERATORS
from morphogen.testing.hosts import LENIENT, HostCase

_NUM_TICKS = 40
_QUICK = GrowthConfig(pruned_ticks=1, embargo_ticks=1, resetting_ticks=1, gates=LENIENT.gates)
_STRICT = GrowthConfig(gates=GateConfig(min_contribution=0.1))
_WEIGHTS = {Op.WAIT: 2, Op.GERMINATE: 3, Op.ADVANCE: 6, Op.SET_ALPHA_TARGET: 0.5, Op.PRUNE: 0.5, Op.FOSSILIZE: 3}
_CONFIGS = (_QUICK, LENIENT, GrowthConfig(), _STRICT)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A state of a run in which something has to be decided.

    Attributes:
        model: Trained a little; acting on it changes what comes next.
        observation: What a policy sees of it.
        mask: What is possible.
        seed: Of the chance a policy is given here.
    """

    model: GrowableModel
    observation: Observation
    mask: ActionMask
    seed: int

    def chance(self) -> np.random.Generator:
        """Return a new generator, equal each time."""
        return np.random.default_rng(self.seed)


def some_sowings(layout: Layout = "NC") -> tuple[Sowing, ...]:
    """Return a sowing of every blueprint that fits ``layout``, under different operators."""
    return tuple(
        Sowing(blueprint=name, operator=OPERATORS[index % len(OPERATORS)], blend_ticks=1 + index)
        for index, name in enumerate(blueprints.names(layout))
    )


def reachable_situations(seed: int, num_ticks: int = _NUM_TICKS, layout: Layout = "NC") -> Iterator[Situation]:
    """Walk a small model at random through every stage, and yield the situation before each decision.

    The caller may act on the model before the walk goes on.
    """
    chance = np.random.default_rng(seed)
    case = HostCase(layout)
    model = case.model(config=_CONFIGS[seed % len(_CONFIGS)], seed=seed)
    sowings = some_sowings(layout)
    for tick in range(num_ticks):
        if chance.random() < 0.8:
            _measure(model, case, chance)
        slots = view_slots(model)
        metric = float(chance.random())
        observation = Observation(tick=tick, total_ticks=num_ticks, metric=metric, slots=slots)
        yield Situation(model, observation, action_mask(slots), seed=int(chance.integers(2**31)))
        execute(model, _next_action(action_mask(view_slots(model)), sowings, chance))
        model.tick()


def check_policy(make_policy: Callable[[Sequence[Sowing]], Policy], num_walks: int = 8) -> None:
    """Let a policy decide in random reachable situations.

    Args:
        make_policy: Returns a new policy that sows from the blueprints given.
        num_walks: Random walks of some tens of decisions.

    Raises:
        AssertionError: An action was masked or could not be executed, equal chance gave different actions, or a global
            generator was used; the message says which.
    """
    sowings = some_sowings()
    policy = make_policy(sowings)
    for walk in range(num_walks):
        for situation in reachable_situations(walk):
            _check_decision(make_policy, policy, sowings, situation)


def _next_action(mask: ActionMask, sowings: Sequence[Sowing], chance: np.random.Generator) -> Action:
    """Draw a possible action, such that seeds come far before they are pruned."""
    weights = [_WEIGHTS[op] for op in mask.ops]
    op = mask.ops[int(chance.choice(len(weights), p=np.divide(weights, sum(weights))))]
    if op is Op.WAIT:
        return Action()
    slots = mask.slots_by_op[op]
    slot = slots[int(chance.integers(len(slots)))]
    sowing = sowings[int(chance.integers(len(sowings)))] if op is Op.GERMINATE else None
    over = int(chance.integers(1, 4)) if op is Op.SET_ALPHA_TARGET else int(chance.integers(4)) if op is Op.PRUNE else 0
    target = float(chance.uniform(0.3, 1.0)) if op is Op.SET_ALPHA_TARGET else 1.0
    return Action(op=op, slot=slot, sowing=sowing, alpha_target=target, over=over)


def _check_decision(
    make_policy: Callable[[Sequence[Sowing]], Policy], policy: Policy, sowings: Sequence[Sowing], situation: Situation
) -> None:
    observation, mask = situation.observation, situation.mask
    before = _chance()
    action = policy.act(observation, mask, situation.chance())
    again = policy.act(observation, mask, situation.chance())
    other = make_policy(sowings).act(observation, mask, situation.chance())
    assert _chance() == before, "a policy must draw from the generator it is given, a global one moved."
    assert action == again, f"equal chance must give equal actions, got {action} and then {again}. Keep no state."
    assert action == other, f"a new policy must act alike, got {action} and from a new one {other}. Keep no state."
    assert mask.allows(action), f"an action must be possible, got {action} when the mask has {mask.slots_by_op}."
    sown = action.sowing is None or action.sowing in sowings
    assert sown, f"a policy must sow what it was given, got {action.sowing}."
    _check_execution(situation.model, action)


def _check_execution(model: GrowableModel, action: Action) -> None:
    try:
        execute(model, action)
    except (SlotError, ValueError) as error:
        raise AssertionError(f"{action} must be executable as the mask allows it: {error}") from error


def _measure(model: GrowableModel, case: HostCase, chance: np.random.Generator) -> None:
    """Give the sensors gradients and contributions, as a run does between decisions; weights are not stepped."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(case.example(seed=int(chance.integers(1000)))).square().mean().backward()
    model.sense()
    for slot, stage in model.stages().items():
        if stage in (Stage.BLENDING, Stage.HOLDING):
            model.record_contribution(slot, float(chance.normal(0.1, 0.2)), 0.01)


def _chance() -> tuple[object, ...]:
    numpy_state = np.random.get_state(legacy=False)
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numpy_state))
