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

from morphogen.control import Action, ActionMask, Observation, Op, Policy, Random, action_mask, execute, view_slots
from morphogen.errors import SlotError
from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, Sowing, blueprints
from morphogen.growth.layouts import Layout
from morphogen.growth.lifecycle import OPERATORS
from morphogen.testing.hosts import LENIENT, HostCase

_NUM_TICKS = 40
_QUICK = GrowthConfig(pruned_ticks=1, embargo_ticks=1, resetting_ticks=1, gates=LENIENT.gates)
_STRICT = GrowthConfig(gates=GateConfig(min_contribution=0.1))
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

    The caller may act on the model, or leave it: then a random action is taken.
    """
    chance = np.random.default_rng(seed)
    case = HostCase(layout)
    model = case.model(config=_CONFIGS[seed % len(_CONFIGS)], seed=seed)
    walk = Random(some_sowings(layout))
    for tick in range(num_ticks):
        if chance.random() < 0.8:
            _measure(model, case, chance)
        slots = view_slots(model)
        metric = float(chance.random())
        observation = Observation(tick=tick, total_ticks=num_ticks, metric=metric, slots=slots)
        yield Situation(model, observation, action_mask(slots), seed=int(chance.integers(2**31)))
        execute(model, walk.act(observation, action_mask(view_slots(model)), chance))
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
    mask = action_mask(view_slots(model))
    for slot in mask.slots_by_op[Op.SET_ALPHA_TARGET]:
        model.record_contribution(slot, float(chance.normal(0.0, 0.2)), 0.01)


def _chance() -> tuple[object, ...]:
    numpy_state = np.random.get_state(legacy=False)
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numpy_state))
