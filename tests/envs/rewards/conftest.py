"""Episodes of one environment told as stories: slots live by the real lifecycle, metric and contributions are made up.

Legend: N environments, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from morphogen.control import Op
from morphogen.envs.frames import Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import RewardConfig, Rewards, objective
from morphogen.growth import Sowing, Stage
from morphogen.growth.config import GrowthConfig
from morphogen.growth.lifecycle import (
    ACTING,
    SlotState,
    advanced,
    fossilized,
    germinated,
    pruned,
    retargeted,
    ticked,
)

_SLOTS = 3


@dataclasses.dataclass
class Story:
    """What is done, and what comes of it.

    Attributes:
        actions: Tick -> (op, slot), and for SET_ALPHA_TARGET the target.
        metric: Tick -> the metric.
        contribution: Tick -> what each acting seed contributes.
        together: Tick -> what all of them do; None for the sum.
        loss: Tick -> the training loss.
        ticks: Of the whole episode.
        fault_at: The tick whose training ends it by a fault.
        growth: How slots cool down.
    """

    actions: Mapping[int, tuple[Op, int] | tuple[Op, int, float]] = dataclasses.field(default_factory=dict)
    metric: Callable[[int], float] = lambda tick: 0.1 + 0.02 * tick
    contribution: Callable[[int], float] = lambda tick: 0.06
    together: Callable[[int], float] | None = None
    loss: Callable[[int], float] = lambda tick: 2.3 / (1 + tick)
    ticks: int = 40
    fault_at: int | None = None
    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)

    def records(self, gamma: float) -> list[StepRecord]:
        """Play it."""
        slots, births, records = [SlotState() for _ in range(_SLOTS)], [np.nan] * _SLOTS, list[StepRecord]()
        before = self._frames(0, slots, births)
        for tick in range(self.ticks):
            op, slot, *target = self.actions.get(tick, (Op.WAIT, 0))
            slots[slot] = _done(slots[slot], op, tick, *target)
            births[slot] = self.metric(tick) if op is Op.GERMINATE else births[slot]
            slots = [ticked(state, tick + 1, self.growth) for state in slots]
            after = self._frames(tick + 1, slots, births)
            is_faulty = tick == self.fault_at
            choices_NH = np.array([[op, slot, 0, 0, 0, 0, 0, 0]])
            ended_N = np.array([is_faulty or tick + 1 == self.ticks])
            records.append(StepRecord(before, after, choices_NH, ended_N, np.array([is_faulty]), gamma))
            if is_faulty:
                break
            before = after
        return records

    def _frames(self, tick: int, slots: Sequence[SlotState], births: Sequence[float]) -> Frames:
        frames = Frames.empty(1, _SLOTS + 1)  # one place stays empty
        acting = sum(state.stage in ACTING for state in slots)
        together = self.contribution(tick) * acting if self.together is None or not acting else self.together(tick)
        seeds = sum(state.has_seed for state in slots)
        run = {
            "tick": tick,
            "total_ticks": self.ticks,
            "loss": np.nan if tick == 0 else self.loss(tick),
            "metric": self.metric(tick),
            "start_metric": self.metric(0),
            "all_off_metric": self.metric(tick) - together,
            "host_parameters": 562,
            "parameters": 562 + 2400 * seeds,
            "quarantined": 0,
        }
        run |= {f"metric_{lag}": self.metric(tick - lag) for lag in range(1, min(5, tick) + 1)}
        for name, value in run.items():
            frames.run(name)[0] = value
        for place, state in enumerate(slots):
            numbers = {
                "stage": state.stage,
                "ticks_in_stage": state.ticks_in_stage,
                "age_ticks": state.age_ticks,
                "alpha": state.alpha,
                "is_pruning": state.is_pruning,
                "parameters": 2400 * state.has_seed,
                "metric_at_birth": births[place] if state.has_seed else np.nan,
                "contribution": self.contribution(tick) if state.stage in ACTING else np.nan,
                "contribution_error": 0.01 if state.stage in ACTING else np.nan,
            }
            for name, value in numbers.items():
                frames.slot(name)[0, place] = value
        return frames


def _done(state: SlotState, op: Op, clock: int, target: float = 1.0) -> SlotState:
    if op is Op.GERMINATE:
        return germinated(state, Sowing(blueprint="conv1d", blend_ticks=3), clock)
    if op is Op.ADVANCE:
        return advanced(state, clock)
    if op is Op.SET_ALPHA_TARGET:
        return retargeted(state, clock, target, over=3, curve="sigmoid")
    if op is Op.PRUNE:
        return pruned(state, clock, over=0, reason="story")
    return fossilized(state, clock) if op is Op.FOSSILIZE else state


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an episode paid: discounted, without shaping and undiscounted, and each term's points tick by tick."""

    discounted: float
    objective: float
    terms: dict[str, np.ndarray]

    def discounted_sum(self, term: str, gamma: float) -> float:
        """What one term came to."""
        return float(gamma ** np.arange(len(self.terms[term])) @ self.terms[term])


def _play(records: Sequence[StepRecord], config: RewardConfig) -> Outcome:
    first = records[0].before
    rewards = Rewards(config, first.num_envs, first.num_slots)
    discounted, plain, paid = 0.0, 0.0, list[dict[str, float]]()
    for step, record in enumerate(records):
        reward_N, terms = rewards.pay(record)
        assert reward_N.shape == (1,) and np.isfinite(reward_N).all()
        assert reward_N[0] == pytest.approx(sum(points_N[0] for points_N in terms.values()), abs=1e-12)
        discounted += config.gamma**step * reward_N[0]
        plain += objective(terms)[0]
        paid.append({name: points_N[0] for name, points_N in terms.items()})
    return Outcome(discounted, plain, {name: np.array([step[name] for step in paid]) for name in paid[0]})


@pytest.fixture(scope="session")
def story() -> type[Story]:
    return Story


@pytest.fixture(scope="session")
def play() -> Callable[[Sequence[StepRecord], RewardConfig], Outcome]:
    """Pay for the records of one environment."""
    return _play


@pytest.fixture(scope="session")
def grown() -> Callable[..., dict[int, tuple[Op, int]]]:
    """The actions that grow one seed from tick ``start``, and make it a fossil after ``held`` ticks of holding."""

    def actions(start: int = 1, slot: int = 0, held: int | None = 4) -> dict[int, tuple[Op, int]]:
        ops = {start: Op.GERMINATE, start + 1: Op.ADVANCE, start + 4: Op.ADVANCE, start + 8: Op.ADVANCE}
        if held is not None:
            ops[start + 8 + held] = Op.FOSSILIZE
        return {tick: (op, slot) for tick, op in ops.items()}

    return actions


@pytest.fixture(scope="session")
def random_records() -> Callable[..., list[StepRecord]]:
    """Any sequence of frames and actions, drawn: 3 environments, 4 places, unknown numbers, places without a slot."""

    def draw(seed: int, steps: int, gamma: float, ends: bool) -> list[StepRecord]:
        rng = np.random.default_rng(seed)
        frames = [_random_frames(rng) for _ in range(steps + 1)]
        records = list[StepRecord]()
        for step, (before, after) in enumerate(zip(frames, frames[1:], strict=False)):
            choices_NH = np.concatenate([rng.integers(0, [len(Op), 4], (3, 2)), np.zeros((3, 6), dtype=int)], axis=1)
            ended_N = np.full(3, ends and step == steps - 1)
            records.append(StepRecord(before, after, choices_NH, ended_N, ended_N & (rng.random(3) < 0.5), gamma))
        return records

    return draw


def _random_frames(rng: np.random.Generator) -> Frames:
    frames = Frames(rng.normal(size=Frames.empty(3, 4).runs_NG.shape), rng.normal(size=Frames.empty(3, 4).slots_NSR.shape))
    frames.slots_NSR[rng.random(frames.slots_NSR.shape) < 0.1] = np.nan
    frames.run("metric")[rng.random(3) < 0.1] = np.nan
    frames.run("loss")[rng.random(3) < 0.2] = np.nan
    for name, values in {"tick": 3.0, "total_ticks": 40.0, "host_parameters": 562.0, "quarantined": 0.0}.items():
        frames.run(name)[:] = values
    frames.slot("stage")[:] = np.where(rng.random((3, 4)) < 0.2, np.nan, rng.integers(0, len(Stage), (3, 4)))
    frames.slot("alpha")[:] = rng.random((3, 4))
    frames.slot("parameters")[:] = rng.integers(0, 3000, (3, 4))
    frames.slot("ticks_in_stage")[:] = rng.integers(0, 12, (3, 4))
    frames.slot("is_pruning")[:] = rng.random((3, 4)) < 0.2
    return frames
