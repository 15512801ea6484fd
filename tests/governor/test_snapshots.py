"""Snapshots: none while anything is suspicious, trusted only after a probation, two good ages kept."""

from __future__ import annotations

from typing import Any

import pytest

from morphogen.governor import Action, GovernorConfig
from morphogen.state import Generation

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=20, alarm_window_steps=6)


def ring(loop: Any) -> list[tuple[int, bool]]:
    """(step, good) of each generation, as :meth:`Governor.save` would write them."""
    generations: tuple[Generation, ...] = loop.governor._keeper.ring.generations
    return [(generation.step, generation.good) for generation in generations]


def test_a_snapshot_becomes_good_only_after_its_probation(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    history = []
    for _ in range(60):
        loop.step()
        history.append(ring(loop))
    assert history[0] == [(0, True)] and history[8] == [(0, True)]
    assert history[9] == [(0, True), (9, False)], "the tenth observation"
    assert history[28] == [(0, True), (9, False)]
    assert history[29] == [(0, True), (9, True), (29, False)], "twenty clean ones later, and the next is taken"
    assert history[49] == [(9, True), (29, True), (49, False)]


@pytest.mark.parametrize("generations", [2, 4])
def test_several_good_ages_are_kept_once_they_exist(kit: Any, generations: int) -> None:
    loop = kit.Loop(CONFIG.replace(generations=generations))
    for _ in range(150):
        loop.step()
        good = [step for step, good in ring(loop) if good]
        assert len(good) == min(generations, 1 + max(0, (loop.governor._watch.observed - 10) // 20))
    assert good == [129 - 20 * age for age in reversed(range(generations))]


def test_an_alarm_starts_the_probation_anew(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    loop.steps(85)
    assert ring(loop) == [(29, True), (49, True), (69, False)]
    assert loop.step(loss=lambda loss: loss + 1e4).action is Action.SKIP
    loop.steps(19)
    assert ring(loop) == [(29, True), (49, True), (69, False)]
    loop.step()
    assert ring(loop)[1] == (69, True)


def test_batches_that_are_not_finite_and_were_skipped_do_not_keep_snapshots_from_proving_good(kit: Any) -> None:
    """They left nothing behind; a stream of data that has one in every five would else never see a good snapshot."""
    loop = kit.Loop(CONFIG, model=kit.small_model(batch_norm=True))
    for number in range(100):
        assert loop.step(inputs=kit.nan if number % 5 == 3 else lambda value: value).rollback is None
    assert [good for _, good in ring(loop)].count(True) == 2 and ring(loop)[0][0] > 0


def test_nothing_is_captured_while_an_alarm_is_in_the_window(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    loop.steps(85)
    loop.steps(4)  # the candidate of step 69 proves good at 89, and the next is due
    loop.step(loss=lambda loss: loss + 1e4)
    assert loop.governor.status == "suspicious"
    before = ring(loop)
    for _ in range(5):
        loop.step()
        assert ring(loop) == before, "due, and suspicious"
    loop.steps(20)
    assert loop.governor.status == "healthy" and ring(loop)[-1][0] > before[-1][0]


def test_a_snapshot_on_probation_is_no_place_to_go_back_to(kit: Any) -> None:
    """Detection can lag: a snapshot as young as the fault may hold it already."""
    loop = kit.Loop(CONFIG)
    loop.steps(75)
    assert ring(loop) == [(29, True), (49, True), (69, False)]
    loop.damage(0.01)
    loop.steps(12)
    loop.damage(3.0)
    assert loop.steps_until("rewind", 6).rollback.to_step == 49
    assert ring(loop) == [(29, True), (49, True)]


def test_a_rewind_to_an_older_age_drops_the_newer_one(kit: Any) -> None:
    loop = kit.Loop(CONFIG.replace(snapshot_every=60))
    loop.steps(250)
    before = [step for step, good in ring(loop) if good]
    assert len(before) == 2
    for _ in range(2):
        loop.damage()
        target = loop.steps_until("rewind", 8).rollback.to_step
        if target != before[0]:
            loop.step()
    assert target == before[0] and ring(loop) == [(before[0], True)]


def test_without_probation_a_snapshot_is_good_at_the_next_clean_step(kit: Any) -> None:
    loop = kit.Loop(CONFIG.replace(probation_steps=0))
    loop.steps(11)
    assert ring(loop) == [(0, True), (9, True)]


def test_memories_are_kept_for_the_snapshots_in_the_ring_alone(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    for _ in range(3):
        loop.steps(100)
        loop.damage()
        loop.steps_until("rewind", 8)
        kept = {generation.observed for generation in loop.governor._keeper.ring.generations}
        assert set(loop.governor._keeper.memories) == kept
