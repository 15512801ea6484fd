"""What holds for every preset: waiting earns the terminal term alone, numbers are finite, settings have an effect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphogen.control import Op
from morphogen.envs.frames import Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import (
    PRESETS,
    TERMS,
    TERMS_OF,
    Ledger,
    RentConfig,
    RewardConfig,
    Rewards,
    describe,
    objective,
    require_same_gamma,
    table,
)


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(metrics=st.lists(st.floats(0, 1), min_size=2, max_size=12), gamma=st.sampled_from([1.0, 0.995, 0.9]))
def test_waiting_earns_the_terminal_term_alone(story, play, preset, metrics, gamma) -> None:
    ticks, config = len(metrics) - 1, RewardConfig(preset=preset, gamma=gamma)
    records = story(metric=lambda tick: metrics[tick], loss=lambda tick: 4 * metrics[tick], ticks=ticks).records(gamma)
    paid = play(records, config)
    terminal = paid.terms["loss_terminal" if preset == "loss" else "terminal"]
    assert (terminal[:-1] == 0).all()
    if preset != "loss":
        assert terminal[-1] == pytest.approx(10 * (metrics[-1] - metrics[0]))
    assert paid.objective == pytest.approx(terminal[-1])
    assert paid.discounted == pytest.approx(gamma ** (ticks - 1) * terminal[-1], abs=1e-9)
    for name, points in paid.terms.items():
        assert TERMS[name].is_shaping or points is terminal or (points == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_huge_numbers_pay_finite_points_without_a_warning(preset) -> None:
    rng, config = np.random.default_rng(0), RewardConfig(preset=preset)
    rewards = Rewards(config, 16, 3)
    with np.errstate(all="raise", under="ignore"):
        for step in range(40):
            before, after = (_huge(rng, step + later) for later in (0, 1))
            choices_NH = rng.integers(0, [len(Op), 3], (16, 2))
            ended_N = rng.random(16) < 0.2
            reward_N, paid = rewards.pay(StepRecord(before, after, choices_NH, ended_N, ended_N, config.gamma))
            assert np.isfinite(reward_N).all() and all(np.isfinite(points).all() for points in paid.values())
            rewards.forget(ended_N)


def _huge(rng: np.random.Generator, tick: int) -> Frames:
    frames = Frames.empty(16, 3)
    frames.runs_NG[:] = rng.choice([-1e6, 0.0, 1e6, np.nan], frames.runs_NG.shape)
    frames.slots_NSR[:] = rng.choice([-1e6, 0.0, 1e6, np.nan], frames.slots_NSR.shape)
    frames.run("loss")[:] = rng.choice([0.0, 1e6, np.inf, np.nan], 16)
    frames.run("start_metric")[:], frames.run("quarantined")[:] = 0.0, 0.0
    for name in ("metric", "all_off_metric"):
        frames.run(name)[:] = rng.choice([-1e6, -np.inf, 1.0, np.nan], 16)
    for name in ("contribution", "contribution_error"):
        frames.slot(name)[:] = rng.choice([-1e6, -np.inf, 1e6, np.inf, np.nan], (16, 3))
    frames.run("host_parameters")[:], frames.run("tick")[:], frames.run("total_ticks")[:] = 1, tick, 1000
    frames.slot("stage")[:] = rng.choice([0, 1, 2, 3, 4, 5, 6, np.nan], (16, 3))
    frames.slot("parameters")[:] = rng.choice([0.0, 1e6, np.nan], (16, 3))
    frames.slot("ticks_in_stage")[:] = rng.choice([0.0, 1e6], (16, 3))
    frames.slot("alpha")[:] = rng.choice([0.0, 1.0, np.nan], (16, 3))
    return frames


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_together_or_alone_each_environment_is_paid_the_same(random_records, preset, seed) -> None:
    config = RewardConfig(preset=preset)
    together, alone = Rewards(config, 3, 4), [Rewards(config, 1, 4) for _ in range(3)]
    for record in random_records(seed, 6, config.gamma, True):
        reward_N = together.pay(record)[0]
        for row, own in enumerate(alone):
            one = slice(row, row + 1)
            parts = (record.choices_NH[one], record.ended_N[one], record.faulty_N[one])
            assert (
                own.pay(StepRecord(record.before.rows(one), record.after.rows(one), *parts, config.gamma))[0] == reward_N[row]
            )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_terms_change_nothing_they_are_given(random_records, seed) -> None:
    (record,) = random_records(seed, 1, RewardConfig().gamma, False)
    kept = [array.copy() for array in _arrays(record)]
    ledger = Ledger(*(np.full((3, 4), 0.1) for _ in range(4)), advance_N=np.full(3, 0.1))
    for term in TERMS.values():
        first, second = term.pay(record, ledger, RewardConfig())[0], term.pay(record, ledger, RewardConfig())[0]
        np.testing.assert_array_equal(first, second)
        assert first.shape == (3,) and first.dtype == np.float64
    for array, before in zip(_arrays(record), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    assert all((array == 0.1).all() for array in ledger.arrays().values())


def _arrays(record: StepRecord) -> list[np.ndarray]:
    frames = [array for each in (record.before, record.after) for array in (each.runs_NG, each.slots_NSR)]
    return [*frames, record.choices_NH, record.ended_N, record.faulty_N]


# -- configuration ----------------------------------------------------------------------------------------------------


class _Reading:
    """A config that notes which of its settings were asked for."""

    def __init__(self, config: RewardConfig) -> None:
        self.config, self.names = config, set[str]()

    def __getattr__(self, name: str) -> object:
        self.names.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("name", list(TERMS))
def test_a_term_reads_the_settings_it_says_it_does(name, random_records) -> None:
    config = _Reading(RewardConfig())
    for record in random_records(0, 20, 0.995, True):
        TERMS[name].pay(record, Ledger.empty(3, 4), config)
    assert config.names == set(TERMS[name].reads)


def test_a_setting_without_effect_is_refused_and_says_where_it_has_one() -> None:
    config = RewardConfig(preset="sparse", alpha_shock=0.2)
    with pytest.raises(ValueError, match=r"`alpha_shock` must be left .* 'sparse'.* effect with shaped, escrow\."):
        Rewards(config, 1, 4)
    Rewards(config.replace(preset="shaped"), 1, 4)
    Rewards(RewardConfig(preset="sparse", rent=RentConfig(weight=0.5)), 1, 4)
    with pytest.raises(ValueError, match=r"`rent` must be left"):
        Rewards(RewardConfig(preset="simplified", rent=RentConfig(weight=0.5)), 1, 4)


def test_a_typo_in_a_preset_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"`preset` must be one of shaped, .* got 'shapd'\. Did you mean 'shaped'\?"):
        RewardConfig(preset="shapd")


def test_another_discount_than_the_agents_is_an_error() -> None:
    require_same_gamma(RewardConfig(gamma=0.9), 0.9)
    with pytest.raises(ValueError, match=r"`gamma` must be 0\.995, .* got 0\.99\. Give both the same"):
        require_same_gamma(RewardConfig(gamma=0.995), 0.99)


def test_a_record_of_another_discount_is_an_error(random_records) -> None:
    rewards = Rewards(RewardConfig(gamma=0.9), 3, 4)
    with pytest.raises(ValueError, match="`gamma`"):
        rewards.pay(random_records(0, 1, 0.995, False)[0])


def test_every_term_is_in_a_preset_and_every_setting_in_a_term() -> None:
    assert set(TERMS_OF) == set(PRESETS)
    assert {name for names in TERMS_OF.values() for name in names} == set(TERMS)
    assert {name for term in TERMS.values() for name in term.reads} == set(RewardConfig.model_fields) - {"preset"}


def test_the_objective_is_the_reward_without_shaping() -> None:
    paid = {name: np.full(2, float(place + 1)) for place, name in enumerate(TERMS_OF["shaped"])}
    assert objective(paid).tolist() == [sum(range(1, 9)) - 2 - 3] * 2


# -- docs -------------------------------------------------------------------------------------------------------------


def test_the_tables_name_everything_and_are_well_formed() -> None:
    text = describe()
    for name in (*PRESETS, *TERMS):
        assert f"| `{name}` |" in text
    assert "| `credit.weight` | 0.2 |" in text and "``" not in text and ":func:" not in text
    assert table() in text.replace("\n\n", "\n")
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines()}
        assert len(columns) == 1 and len(block.splitlines()) > 2
    assert all(cell.strip() for line in table().splitlines() for cell in line.strip("|").split("|"))
