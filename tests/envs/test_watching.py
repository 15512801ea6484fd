"""A watch on a run writes the frames that an environment writes of the same run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from morphogen import control, tasks
from morphogen.envs import GrowthEnvConfig
from morphogen.envs.episode import Episode
from morphogen.envs.frames import Frames
from morphogen.envs.masks import action_masks, sample_choices
from morphogen.envs.watching import Watch

TICKS, TICK_STEPS = 20, 3


def test_it_writes_what_the_environment_writes() -> None:
    config = GrowthEnvConfig(total_steps=TICKS * TICK_STEPS, tick_steps=TICK_STEPS)
    watched, played = (Episode(tasks.get("digits"), config, seed=2, number=0) for _ in range(2))
    training, model = watched.training, watched.model
    watch, now, expected = Watch(played.menu, TICKS), Frames.empty(1, 4), Frames.empty(1, 4)
    generator, ops = np.random.default_rng(2), set()
    watch.measure(training)
    while True:
        watch.write(training, now)
        played.write(expected, 0)
        np.testing.assert_array_equal(now.runs_NG, expected.runs_NG)
        np.testing.assert_array_equal(now.slots_NSR, expected.slots_NSR)
        if played.over:
            break
        choices = sample_choices(action_masks(now, watch.menu), generator)[0]
        ops.add(int(choices[0]))
        played.step(choices)
        action = watch.menu.action(choices)
        watch.acted(action)
        control.execute(model, action)
        model.train()
        losses = []
        for _ in range(TICK_STEPS):
            loss, _ = training.backward(*training.batch(), training.structure())
            losses.append(float(loss))
            training.step()
            training.cursor.step += 1
        model.sense()
        model.tick()
        watch.seen.loss = played.memory.loss
        assert watch.seen.loss == pytest.approx(np.mean(losses), rel=1e-6)
        watch.measure(training)
    assert len(ops) >= 4  # else little was compared


def test_it_goes_on_from_its_state() -> None:
    config = GrowthEnvConfig(total_steps=6, tick_steps=2)
    episode = Episode(tasks.get("digits"), config, seed=2, number=0)
    watch, other = Watch(episode.menu, 3), Watch(episode.menu, 3)
    watch.measure(episode.training)
    watch.acted(control.Action(op=control.Op.GERMINATE, slot=episode.menu.slots[1], sowing=episode.menu.blueprints[0]))
    other.load_state_dict(watch.state_dict())
    assert other.seen == watch.seen and other.seen.last_slot == 1
    assert other.seen.births == {episode.menu.slots[1]: watch.seen.metrics[-1]}
    other.seen.metrics.append(1.0)
    assert len(watch.seen.metrics) == 1
    assert dataclasses.asdict(watch.seen)["last_op"] == control.Op.GERMINATE
