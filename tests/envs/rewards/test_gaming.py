"""What is no growth must not pay like growth: told episodes with the same metric, so that the terms alone decide."""

from __future__ import annotations

import pytest

from morphogen.control import Op
from morphogen.envs.rewards import RewardConfig
from morphogen.growth.config import GrowthConfig

_FULL = ("shaped", "escrow", "basic", "basic_plus")
_THAT_PRICE_ACTIONS = (*_FULL, "simplified", "minimal", "loss")


def _rises(tick: int, to: float = 0.85) -> float:
    return to - (to - 0.1) * 0.8**tick


@pytest.fixture
def earned(story, play):
    """Preset, actions and what else a story has -> what it pays, discounted and as objective."""

    def earn(preset: str, actions, **parts) -> tuple[float, float]:
        config = RewardConfig(preset=preset)
        paid = play(story(actions, **{"metric": _rises, **parts}).records(config.gamma), config)
        return paid.discounted, paid.objective

    return earn


def _farm() -> dict[int, tuple[Op, int]]:
    """Germinate and prune, in turn in three slots."""
    cycle = [(Op.GERMINATE, 0), (Op.GERMINATE, 1), (Op.GERMINATE, 2), (Op.PRUNE, 0), (Op.PRUNE, 1), (Op.PRUNE, 2)]
    return {tick: cycle[tick % 6] for tick in range(36)}


@pytest.mark.parametrize("preset", _THAT_PRICE_ACTIONS)
def test_germinating_and_pruning_pays_less_than_doing_nothing(earned, preset) -> None:
    farmed = earned(preset, _farm(), growth=GrowthConfig(embargo_ticks=0))
    waited = earned(preset, {})
    assert farmed[0] < waited[0] and farmed[1] < waited[1]


@pytest.mark.parametrize("preset", _FULL)
def test_growth_that_helps_pays_more_than_doing_nothing_and_than_farming(earned, grown, preset) -> None:
    honest = earned(preset, grown(), metric=lambda tick: _rises(tick, to=0.90))
    for others in (earned(preset, {}), earned(preset, _farm(), growth=GrowthConfig(embargo_ticks=0))):
        assert honest[0] > others[0] + 0.1 and honest[1] > others[1] + 0.1


@pytest.mark.parametrize("preset", _FULL)
def test_a_seed_the_host_cannot_do_without_but_that_hurts_the_whole_pays_less(earned, grown, preset) -> None:
    honest = earned(preset, grown())
    ransom = earned(preset, grown(), contribution=lambda tick: 0.3, together=lambda tick: -0.05)
    assert ransom[0] < honest[0] - 0.1 and ransom[1] < honest[1] - 0.1
    pruned = grown(held=None) | {13: (Op.PRUNE, 0)}
    assert ransom[1] < earned(preset, pruned, together=lambda tick: -0.05)[1]


@pytest.mark.parametrize("preset", _FULL)
def test_turning_at_alpha_pays_less_than_keeping_the_seed(earned, grown, preset) -> None:
    turning = grown(held=None)
    for tick in range(10, 39, 4):
        turning |= {tick: (Op.SET_ALPHA_TARGET, 0, 0.5 if tick % 8 == 2 else 1.0), tick + 3: (Op.ADVANCE, 0)}
    turned, honest = earned(preset, turning), earned(preset, grown())
    assert turned[0] < honest[0] and turned[1] < honest[1]
    if preset in ("shaped", "escrow"):  # also if it becomes a fossil after all; the others have no price on turning
        kept = {tick: done for tick, done in turning.items() if tick < 34} | {36: (Op.FOSSILIZE, 0)}
        late = grown(held=27)
        assert earned(preset, kept)[0] < earned(preset, late)[0] and earned(preset, kept)[1] < earned(preset, late)[1]


@pytest.mark.parametrize("preset", _FULL)
def test_a_rush_to_fossilise_pays_less_than_waiting_for_proof(earned, grown, preset) -> None:
    proves = {"contribution": lambda tick: 0.02 if tick < 13 else 0.06}
    honest = earned(preset, grown(held=5), **proves)
    rushed = earned(preset, grown(held=1), **proves)
    assert rushed[0] < honest[0] - 0.05 and rushed[1] < honest[1] - 0.05


@pytest.mark.parametrize("preset", _FULL)
def test_three_hasty_fossils_pay_less_than_one_that_is_enough(earned, grown, preset) -> None:
    three = {1: (Op.GERMINATE, 0), 2: (Op.ADVANCE, 0), 3: (Op.GERMINATE, 1), 4: (Op.ADVANCE, 1), 6: (Op.ADVANCE, 0)}
    three |= {8: (Op.ADVANCE, 1), 10: (Op.ADVANCE, 0), 11: (Op.FOSSILIZE, 0), 12: (Op.ADVANCE, 1), 13: (Op.FOSSILIZE, 1)}
    three |= {14: (Op.GERMINATE, 2), 15: (Op.ADVANCE, 2), 18: (Op.ADVANCE, 2), 22: (Op.ADVANCE, 2), 23: (Op.FOSSILIZE, 2)}
    assert earned(preset, three)[1] < earned(preset, grown())[1]


@pytest.mark.parametrize("preset", [*_THAT_PRICE_ACTIONS, "sparse"])
def test_a_fault_never_pays(earned, grown, preset) -> None:
    whole = earned(preset, grown())
    for tick in (5, 20, 38):
        assert earned(preset, grown(), fault_at=tick)[0] < whole[0] - 1.0
