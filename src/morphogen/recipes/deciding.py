"""Who decides about the slots of an arm: a built-in policy, which looks at the model, or a trained one, which sees frames.

Legend: N = 1 run, S slots, H choices of an action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from morphogen import control
from morphogen.control import Action, Observation, Policy
from morphogen.envs.episode import menu_of
from morphogen.envs.frames import Frames
from morphogen.envs.learned import LearnedPolicy
from morphogen.envs.masks import action_masks
from morphogen.envs.observation import observe
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import Rewards
from morphogen.envs.watching import Watch
from morphogen.growth import Stage
from morphogen.state import RandomStreams
from morphogen.tasks import Task
from morphogen.tasks.training import TaskTraining


@dataclasses.dataclass(frozen=True)
class Tick:
    """What a decider is told of a tick that was trained.

    Attributes:
        tick: Decisions so far.
        total_ticks: Decisions of the whole run.
        loss: Mean of the training loss over it.
        skipped: Optimizer steps the governor stopped in it.
        quarantined: Seeds it took out in it.
    """

    tick: int
    total_ticks: int
    loss: float
    skipped: int
    quarantined: int


class Decider(Protocol):
    """Measures what it needs and decides.

    Attributes:
        extras: What evolves, by name: part of the run, so that a rewind takes it back and a checkpoint holds it.
    """

    extras: Mapping[str, Any]

    def prepare(self, training: TaskTraining) -> None:
        """Look at the untrained network, before the governor does: a rewind may go back as far as that."""
        ...

    def begin(self) -> Action:
        """Return what to do before the first step; called once, unless the run is resumed."""
        ...

    def measure(self, training: TaskTraining, tick: Tick) -> float:
        """Measure the run after a tick, and return the metric on the decision split."""
        ...

    def decide(self, training: TaskTraining, tick: Tick) -> Action:
        """Return what to do now; called after :meth:`measure`."""
        ...


class PolicyDecider:
    """A built-in policy.

    Args:
        policy: Who decides.
        stream: Its chance.
    """

    def __init__(self, policy: Policy, stream: np.random.Generator) -> None:
        """Hold both."""
        self.extras: Mapping[str, Any] = {"policy": stream}
        self._policy, self._stream, self._metric = policy, stream, float("nan")

    def prepare(self, training: TaskTraining) -> None:
        """Look at nothing."""

    def begin(self) -> Action:
        """Wait: the first decision is after the first tick."""
        return Action()

    def measure(self, training: TaskTraining, tick: Tick) -> float:
        """Measure the metric, and what the seeds on trial contribute."""
        stages = training.built.model.stages().items()
        self._metric = training.measure([name for name, stage in stages if stage in (Stage.BLENDING, Stage.HOLDING)]).metric
        return self._metric

    def decide(self, training: TaskTraining, tick: Tick) -> Action:
        """Return what the policy does."""
        views = control.view_slots(training.built.model)
        seen = Observation(tick=tick.tick, total_ticks=tick.total_ticks, metric=self._metric, slots=views)
        return self._policy.act(seen, control.action_mask(views), self._stream)


class LearnedDecider:
    """A trained policy, which sees what it saw in training.

    That is: it decides before the first step too; frames are written, and what a reward remembers is kept, as the environment
    does it. What differs is how the network is trained: under the job's governor, which looks at each step and goes on after a
    rewind, where the environment's looks at each tick and ends the episode. A rewind takes the policy's memory and its chance
    back with it.

    Args:
        policy: Trained; not changed.
        task: What is trained on.
        total_ticks: Decisions of the run.
        generator: Draws the choices, as in training.

    Raises:
        ValueError: The task does not fit the policy's places.
    """

    def __init__(self, policy: LearnedPolicy, task: Task, total_ticks: int, generator: torch.Generator) -> None:
        """Have seen nothing."""
        self._policy = policy.on(task.name)
        self._config = self._policy.origin.env
        self._watch = Watch(menu_of(task, self._config), total_ticks)
        self._rewards = Rewards(self._config.reward, 1, self._config.num_slots)
        self._now = Frames.empty(1, self._config.num_slots)
        self._choices_NH = np.zeros((1, len(self._watch.menu.layout.sizes)), dtype=np.int64)
        self._generator = generator
        self.extras: Mapping[str, Any] = {"decider": self, "policy": generator}

    def prepare(self, training: TaskTraining) -> None:
        """Measure the untrained network."""
        self._watch.measure(training)
        self._watch.write(training, self._now)

    def begin(self) -> Action:
        """Return what the policy does with the untrained network."""
        return self._act()

    def measure(self, training: TaskTraining, tick: Tick) -> float:
        """Measure as the environment does, and remember what the reward remembers."""
        seen = self._watch.seen
        seen.loss, seen.skipped, seen.quarantined = tick.loss, tick.skipped, tick.quarantined
        metric = self._watch.measure(training)
        before, self._now = self._now, Frames.empty(1, self._config.num_slots)
        self._watch.write(training, self._now)
        ended_N = np.array([tick.tick >= tick.total_ticks])
        record = StepRecord(
            before=before,
            after=self._now,
            choices_NH=self._choices_NH,
            ended_N=ended_N,
            faulty_N=np.zeros(1, dtype=bool),
            gamma=self._config.reward.gamma,
        )
        self._rewards.pay(record)
        return metric

    def decide(self, training: TaskTraining, tick: Tick) -> Action:
        """Return what the policy does."""
        return self._act()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves, copied."""
        return {
            "watch": self._watch.state_dict(),
            "policy": self._policy.state_dict(),
            "rewards": self._rewards.state_dict(),
            "now": [self._now.runs_NG.copy(), self._now.slots_NSR.copy()],
            "choices": self._choices_NH.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._watch.load_state_dict(state["watch"])
        self._policy.load_state_dict(state["policy"])
        self._rewards.load_state_dict(state["rewards"])
        self._now = Frames(*state["now"])
        self._choices_NH = state["choices"]

    def _act(self) -> Action:
        menu = self._watch.menu
        observation_ND = observe(self._now, self._rewards.ledger, menu)
        self._choices_NH = self._policy.choose(observation_ND, action_masks(self._now, menu), generator=self._generator)
        action = menu.action(self._choices_NH[0])
        self._watch.acted(action)
        return action if action.slot is None else dataclasses.replace(action, reason="chosen by the trained policy")


def make_decider(policy: str | LearnedPolicy, task: Task, streams: RandomStreams, total_ticks: int) -> Decider:
    """Return the decider of a policy: the name of a built-in one, or a trained one."""
    if isinstance(policy, str):
        return PolicyDecider(control.make(policy, task.blueprints), streams.numpy("policy"))
    return LearnedDecider(policy, task, total_ticks, streams.torch("policy"))
