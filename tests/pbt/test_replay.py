"""The best lineage, trained again alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from morphogen.errors import MorphogenError
from morphogen.pbt import PBTConfig, PopulationTrainer
from morphogen.pbt.replay import replay
from morphogen.pbt.snapshots import to_bytes
from morphogen.testing.engine_members import troubled_member

Settings = Callable[..., PBTConfig]


@pytest.mark.parametrize("strategy", ["reset", "copy", "rescale", "adaptive", ("exp_avg_sq", "step")])
@pytest.mark.parametrize("method", ["truncation", "binary_tournament"])
def test_the_best_lineage_alone_is_the_same_to_the_bit(settings: Settings, strategy: Any, method: str) -> None:
    config = settings(total_steps=24, optimizer_exploit_strategy=strategy, exploit_method=method, explore_all=True)
    result = PopulationTrainer(troubled_member, config).run()
    assert any(exploit.is_exploit for exploit in result.exploits) and any(not e.is_exploit for e in result.exploits)
    again = replay(troubled_member, config, result.reports, result.exploits)
    assert again.is_same and [interval.interval for interval in again.intervals] == list(range(1, 9))
    assert again.segments[-1].member == result.best
    assert to_bytes(again.parameters) == to_bytes(result.parameters)


def test_any_lineage_can_be_replayed_and_some_are_of_several_members(settings: Settings) -> None:
    config = settings(total_steps=24, truncation_ratio=0.4)
    result = PopulationTrainer(troubled_member, config).run()
    replays = [replay(troubled_member, config, result.reports, result.exploits, member=member) for member in range(5)]
    assert all(each.is_same for each in replays)
    assert max(len({segment.member for segment in each.segments}) for each in replays) > 1


def test_another_seed_does_not_pass_for_the_same(settings: Settings) -> None:
    config = settings()
    result = PopulationTrainer(troubled_member, config).run()
    assert not replay(lambda place, values, seed: troubled_member(place, values, seed + 1), config, result.reports, ()).is_same


def test_what_cannot_be_replayed_is_said(settings: Settings) -> None:
    with pytest.raises(ValueError, match="`synchronous` must be True"):
        replay(troubled_member, settings(synchronous=False), (), ())
    with pytest.raises(MorphogenError, match="no report to replay"):
        replay(troubled_member, settings(), (), ())
