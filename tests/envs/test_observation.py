"""What is observed is in its range, tells unknown from zero, and leaves out nothing that a reward looks at."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from morphogen import tasks
from morphogen.control import Op
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.choices import STYLES, TEMPOS_TICKS, Layout
from morphogen.envs.episode import menu_of
from morphogen.envs.features import RUN_GROUPS, SLOT_GROUPS
from morphogen.envs.frames import RUN_NUMBERS, SLOT_NUMBERS, Frames
from morphogen.envs.masks import sample_choices
from morphogen.envs.observation import feature_names, observation_space, observe, table
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import PRESETS, Ledger, RewardConfig, Rewards
from morphogen.growth import Stage
from morphogen.testing import LENIENT

MENU = menu_of(tasks.get("digits"), GrowthEnvConfig(num_slots=3))
NAMES = feature_names(MENU.layout)
PLACE = {name: place for place, name in enumerate(NAMES)}
SPACE = observation_space(MENU)
UNOBSERVED = {"episode", "test_metric"}  # the next is like the last; and the test split is none of the agent's business
WEIGHTS = {Op.WAIT: 2.0, Op.GERMINATE: 4.0, Op.ADVANCE: 6.0, Op.SET_ALPHA_TARGET: 1.0, Op.PRUNE: 0.7, Op.FOSSILIZE: 1.0}
Played = list[tuple[Frames, Ledger, Any]]


def of(observation_D: Any, name: str) -> float:
    return float(observation_D[PLACE[name]])


def known_frames(num_envs: int = 1) -> Frames:
    """Runs of which everything is known, with a holding seed in the first slot, and no third slot."""
    frames = Frames.empty(num_envs, 3)
    run = dict.fromkeys(RUN_NUMBERS, 0.0) | {f"metric_{lag}": 0.5 for lag in range(1, 6)}
    run |= {"tick": 7, "total_ticks": 20, "loss": 1.2, "metric": 0.6, "metric_error": 0.02, "start_metric": 0.1}
    run |= {"best_metric": 0.61, "all_off_metric": 0.4, "host_parameters": 300, "parameters": 500, "relative_flops": 1.3}
    slot = dict.fromkeys(SLOT_NUMBERS, 1.0) | {"stage": Stage.HOLDING, "is_pruning": 0, "ramp_ticks_left": 0, "refusals": 4}
    slot |= {"contribution": 0.05, "contribution_error": 0.01, "contribution_tick": 6, "contribution_peak": 0.06}
    slot |= {"gradient_ratio": 0.3, "parameters": 200, "metric_at_birth": 0.45, "operator": 2}
    for name, value in run.items():
        frames.run(name)[:] = value
    for name, value in slot.items():
        frames.slot(name)[:, :2] = value
    return frames


def empty_ledger(num_envs: int = 1) -> Ledger:
    return Ledger.empty(num_envs, 3)


@pytest.fixture(scope="module")
def played() -> Played:
    """Every tick of random play in two environments: frames, ledger, observation."""
    growth = LENIENT.replace(embargo_ticks=2, resetting_ticks=2)
    env = GrowthVectorEnv("digits", 2, total_steps=30, tick_steps=1, num_slots=3, growth=growth, reward="escrow")
    generator, found = np.random.default_rng(1), Played()
    weights = np.array([WEIGHTS[op] for op in Op])
    observation, info = env.reset(seed=0)
    for _ in range(65):
        found.append((env.frames.copy(), env._rewards.ledger, observation))  # pyright: ignore[reportPrivateUsage]
        chance_NO = weights * info["action_mask"]["op"]
        ops = [generator.choice(len(Op), p=chance / chance.sum()) for chance in chance_NO]
        masks = {**info["action_mask"], "op": np.arange(len(Op)) == np.array(ops)[:, None]}
        observation, *_, info = env.step(sample_choices(masks, generator))
    env.close()
    return found


def test_every_number_of_real_play_is_in_its_own_range(played: Played) -> None:
    low, high = np.inf, -np.inf
    for _, _, observation in played:
        assert all(SPACE.contains(row) for row in observation)
        low, high = np.minimum(low, observation.min(0)), np.maximum(high, observation.max(0))
    of_real_slots = [place for place, name in enumerate(NAMES) if not name.startswith("slot 2")]
    assert not any(high[place] for place, name in enumerate(NAMES) if name.startswith("slot 2"))
    moves = {NAMES[place] for place in of_real_slots if high[place] > low[place]}
    stages = {f"slot 0: stage {stage.name.lower()}" for stage in Stage} - {"slot 0: stage pruned"}
    needed = {"progress", "loss", "metric", "compute", "gain_5", "all_seeds", "slot 0: contribution", "slot 1: freshness"}
    needed |= {"slot 0: alpha", "slot 0: gate_open", "slot 1: ramp_left", "slot 0: credit", "slot 0: gradient", "slot 1: peak"}
    assert needed | stages <= moves, (needed | stages) - moves


def test_no_number_sits_at_its_bound_that_should_not(played: Played) -> None:
    """Features that are no flags must not be clipped in ordinary play, or differences would be lost."""
    observations = np.concatenate([observation for *_, observation in played])
    for name in ("loss", "metric", "compute", "size", "all_seeds", "slot 0: rent", "slot 0: contribution"):
        column = observations[:, PLACE[name]]
        assert np.abs(column).max() < 1.0 and np.ptp(column) > 0.05, name


@pytest.mark.parametrize(("style", "tempo"), [(0, 0), (1, 2)])
def test_how_a_seed_will_blend_in_is_seen_before_it_does(style: int, tempo: int) -> None:
    env = GrowthVectorEnv("digits", 1, total_steps=2, tick_steps=1)
    env.reset(seed=0)
    observation, *_ = env.step(np.array([[int(Op.GERMINATE), 0, 1, style, tempo, 2, 0, 0]]))
    env.close()
    place = {name: place for place, name in enumerate(feature_names(env.menu.layout))}
    curve = STYLES[style][1]
    assert observation[0, place["slot 0: tempo"]] == pytest.approx(TEMPOS_TICKS[tempo] / 8.0)
    assert {name: observation[0, place[f"slot 0: curve {name}"]] for name in ("linear", "cosine", "sigmoid")} == {
        name: float(name == curve) for name in ("linear", "cosine", "sigmoid")
    }


def test_a_batch_is_its_rows(played: Played) -> None:
    frames = Frames(*(np.concatenate([getattr(f, name) for f, *_ in played]) for name in ("runs_NG", "slots_NSR")))
    arrays_of = [ledger.arrays() for _, ledger, _ in played]
    ledger = Ledger(**{name: np.concatenate([each[name] for each in arrays_of]) for name in arrays_of[0]})
    together = observe(frames, ledger, MENU)
    for row in range(frames.num_envs):
        own = Ledger(**{name: array[row : row + 1] for name, array in ledger.arrays().items()})
        np.testing.assert_array_equal(observe(frames.rows(slice(row, row + 1)), own, MENU)[0], together[row])
    np.testing.assert_array_equal(np.concatenate([observation for *_, observation in played]), together)


def test_nothing_unmeasured_looks_measured(played: Played) -> None:
    looked = 0
    for frames, _, observation in played:
        for row, place in np.argwhere(np.isnan(frames.slot("contribution"))):
            for name in ("contribution_known", "contribution", "contribution_error", "freshness", "peak"):
                assert of(observation[row], f"slot {place}: {name}") == 0.0
            looked += 1
        for row, place in np.argwhere(frames.slot("contribution_tick") == frames.run("tick")[:, None]):
            assert of(observation[row], f"slot {place}: freshness") == 1.0
            looked += 1000
    assert looked % 1000 > 100 and looked > 20_000


def test_a_measurement_grows_old() -> None:
    frames = known_frames()
    found = []
    for tick in (6, 7, 9):
        frames.run("tick")[:] = tick
        found.append(of(observe(frames, empty_ledger(), MENU)[0], "slot 0: freshness"))
    assert found == [1.0, 0.5, 0.25]
    frames.run("tick")[:] = 5  # measured later than now: not known
    observation = observe(frames, empty_ledger(), MENU)[0]
    assert of(observation, "slot 0: contribution_known") == of(observation, "slot 0: contribution") == 0.0


@pytest.mark.parametrize("name", sorted({*RUN_NUMBERS} - UNOBSERVED))
def test_unknown_is_not_zero_in_a_run(name: str) -> None:
    at_zero, unknown = known_frames(), known_frames()
    at_zero.run(name)[:], unknown.run(name)[:] = 8.0 * (name == "total_ticks"), np.nan  # tick 7 is over
    if name == "last_slot":
        unknown.run(name)[:] = -1.0  # nowhere
    found, expected = (observe(frames, empty_ledger(), MENU) for frames in (unknown, at_zero))
    assert (found != expected).any()


@pytest.mark.parametrize("name", SLOT_NUMBERS)
def test_unknown_is_not_zero_in_a_slot(name: str) -> None:
    at_zero, unknown = known_frames(), known_frames()
    at_zero.slot(name)[:, 0], unknown.slot(name)[:, 0] = 0.0, np.nan
    found, expected = (observe(frames, empty_ledger(), MENU)[0] for frames in (unknown, at_zero))
    different = {NAMES[place] for place in np.flatnonzero(found != expected)}
    assert different and not any(each.startswith("slot 1") for each in different)
    flags = {f"slot 0: {group.flag}" for group in SLOT_GROUPS}
    assert any(of(found, flag) == 0.0 and of(expected, flag) == 1.0 for flag in flags & different)


@pytest.mark.parametrize("name", sorted(UNOBSERVED))
def test_what_is_not_to_be_observed_is_not(name: str) -> None:
    first, second = known_frames(), known_frames()
    first.run(name)[:], second.run(name)[:] = 0.1, 0.9
    np.testing.assert_array_equal(observe(first, empty_ledger(), MENU), observe(second, empty_ledger(), MENU))


def test_a_place_without_a_slot_is_zero_throughout() -> None:
    ledger = Ledger(**{name: np.full_like(array, 0.3) for name, array in empty_ledger().arrays().items()})
    frames = known_frames()
    frames.slots_NSR[:, 2] = frames.slots_NSR[:, 0]
    frames.slot("stage")[:, 2] = np.nan  # all else is left over
    observation = observe(frames, ledger, MENU)[0]
    assert not any(of(observation, name) for name in NAMES if name.startswith("slot 2"))
    assert of(observation, "slot 1: exists") == 1.0


ANY = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, -1.0, 2.0, 5.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324]),
)


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, (2, len(RUN_NUMBERS)), elements=ANY),
    arrays(np.float64, (2, 3, len(SLOT_NUMBERS)), elements=ANY),
    arrays(np.float64, (2, 3), elements=ANY),
)
def test_whatever_the_frames_hold_is_in_range_and_each_row_by_itself(runs: Any, slots: Any, credit: Any) -> None:
    frames = Frames(runs, slots)
    ledger = dataclasses.replace(empty_ledger(2), credit_NS=credit, advance_N=credit[:, 0].copy())
    observation = observe(frames, ledger, MENU)
    assert observation.dtype == np.float32 and all(SPACE.contains(row) for row in observation)
    for prefix, groups in (("", RUN_GROUPS), ("slot 1: ", SLOT_GROUPS)):
        for group in groups:
            for row in observation:
                flag = of(row, prefix + group.flag)
                values = [of(row, prefix + f"{f.name} {part}".strip()) for f in group.features for part in f.parts(MENU.layout)]
                assert flag in (0.0, 1.0) and (flag == 1.0 or not any(values))
    frames.runs_NG[0], frames.slots_NSR[0] = np.nan, np.nan
    np.testing.assert_array_equal(observe(frames, ledger, MENU)[1], observation[1])
    assert not observe(Frames.empty(2, 3), empty_ledger(2), MENU).any()


def test_small_differences_that_matter_are_seen() -> None:
    """A percentage point of contribution, half of one of a gain, a tick, and a seed of a tenth of the host."""
    base = observe(known_frames(), empty_ledger(), MENU)[0]
    for name, is_slot, add, feature, least in (
        ("contribution", True, -0.045, "slot 0: contribution", 0.3),
        ("metric_1", False, 0.095, "gain_1", 0.3),
        ("ticks_in_stage", True, 1.0, "slot 0: ticks_in_stage", 0.1),
        ("parameters", True, 30.0, "slot 0: rent", 0.01),
        ("tick", False, 1.0, "progress", 0.04),
    ):
        frames = known_frames()
        (frames.slot if is_slot else frames.run)(name)[:] += add
        assert abs(of(observe(frames, empty_ledger(), MENU)[0], feature) - of(base, feature)) > least, name
    frames = known_frames()
    frames.slot("contribution")[:] = 0.01
    assert of(observe(frames, empty_ledger(), MENU)[0], "slot 0: contribution") == pytest.approx(
        math.asinh(1) / math.asinh(100), rel=1e-6
    )


class Recording(Frames):
    """Frames that note which numbers were asked for."""

    def run(self, name: str) -> Any:
        asked.add(("run", name))
        return super().run(name)

    def slot(self, name: str) -> Any:
        asked.add(("slot", name))
        return super().slot(name)


asked: set[tuple[str, str]] = set()


def recording() -> Frames:
    frames = known_frames(2)
    return Recording(frames.runs_NG, frames.slots_NSR)


@pytest.mark.parametrize("preset", PRESETS)
def test_everything_a_reward_depends_on_is_observed(preset: Any) -> None:
    asked.clear()
    observe(recording(), empty_ledger(2), MENU)
    observed = set(asked)
    asked.clear()
    rewards = Rewards(RewardConfig(preset=preset), 2, 3)
    choices = np.array([[int(Op.FOSSILIZE), 0, 0, 0, 0, 0, 0, 0], [int(Op.PRUNE), 0, 0, 0, 0, 0, 0, 0]])
    ended = np.array([True, False])
    rewards.pay(StepRecord(recording(), recording(), choices, ended, ended, rewards.config.gamma))
    assert asked and asked <= observed, asked - observed


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Ledger)])
def test_what_a_reward_remembers_is_observed(field: str) -> None:
    found = []
    for amount in (0.0, 0.01, 0.1):
        ledger = empty_ledger()
        ledger = dataclasses.replace(ledger, **{field: np.full_like(getattr(ledger, field), amount)})
        found.append(observe(known_frames(), ledger, MENU))
    assert np.abs(found[1] - found[0]).max() > 0.01 and np.abs(found[2] - found[1]).max() > 0.05


def test_names_space_and_numbers_go_together() -> None:
    for layout in (Layout(), Layout(1, 1), Layout(6, 2)):
        menu = dataclasses.replace(MENU, slots=("one",), blueprints=MENU.blueprints[:1], layout=layout)
        names, space = feature_names(layout), observation_space(menu)
        found = observe(Frames.empty(2, layout.num_slots), Ledger.empty(2, layout.num_slots), menu)
        assert len(names) == len(set(names)) == space.shape[0] == found.shape[1]
        assert set(np.unique(space.low)) == {-1.0, 0.0} and set(np.unique(space.high)) == {1.0}
    assert space.low[names.index("slot 0: alpha")] == 0.0 and space.low[names.index("gain_1")] == -1.0


def test_the_table_has_a_row_for_every_feature() -> None:
    rows = [line for line in table().splitlines() if line.startswith(("| run", "| slot"))]
    features = [feature.name for groups in (RUN_GROUPS, SLOT_GROUPS) for group in groups for feature in group.features]
    flags = [group.flag for groups in (RUN_GROUPS, SLOT_GROUPS) for group in groups]
    assert sorted(row.split("`")[1] for row in rows) == sorted(features + flags)
