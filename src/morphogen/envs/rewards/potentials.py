"""Potential-based shaping: gamma * phi(after) - phi(before), with phi = 0 where an episode is over. Pure.

Discounted with gamma, what a shaping term pays from frames 0 to T adds up to gamma^T * phi_T - phi_0, whatever was done and to
which slot: over an episode, in which phi is 0 at both ends, to nothing. It moves payment to where it was earned, and leaves
what is best as it is (Ng, Harada and Russell, 1999). phi is a function of the frames alone, and sums over all slots.

Legend: N environments, S places for slots.
"""

from __future__ import annotations

import numpy as np

from morphogen.envs.frames import FloatArray, Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards.config import RewardConfig
from morphogen.growth import Stage
from morphogen.growth.lifecycle import LIVE

_STAGES = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


def metric_potential(frames: Frames, config: RewardConfig) -> FloatArray:
    """Return progress_share * metric_weight * (metric - start_metric), [N]; 0 where the metric is not a number."""
    gained_N = frames.run("metric") - frames.run("start_metric")
    return config.progress_share * config.metric_weight * np.where(np.isfinite(gained_N), gained_N, 0.0)


def stage_potential(frames: Frames, config: RewardConfig) -> FloatArray:
    """Return weight * sum over slots of (potential of the stage + min(dwell_per_tick * ticks_in_stage, dwell_cap)), [N].

    A slot without a seed has 0, and so has one whose seed is on its way out; a fossil has no dwell.
    """
    stages = config.stages
    of_stage = np.zeros(len(Stage) + 1)  # the last is for places without a slot
    of_stage[list(_STAGES)] = stages.potentials
    stage_NS = np.where(np.isnan(frames.slot("stage")), len(Stage), frames.slot("stage")).astype(np.int64)
    dwell_NS = np.minimum(stages.dwell_per_tick * np.nan_to_num(frames.slot("ticks_in_stage")), stages.dwell_cap)
    potential_NS = of_stage[stage_NS] + np.where(frames.in_stage(tuple(LIVE)), dwell_NS, 0.0)
    return stages.weight * np.where(frames.slot("is_pruning") == 1.0, 0.0, potential_NS).sum(1)


def progress(record: StepRecord, config: RewardConfig) -> FloatArray:
    """Shaping by the metric: what the metric gains is paid when it does, and settled by ``terminal`` at the end.

    gamma * phi(after) - phi(before), phi = progress_share * metric_weight * (metric - start_metric), 0 once the episode is over
    """
    return _shaping(record, metric_potential(record.before, config), metric_potential(record.after, config), config.gamma)


def stages(record: StepRecord, config: RewardConfig) -> FloatArray:
    """Shaping by the stages of all seeds: a way to go is paid step by step, and taken back with the seed or at the end.

    gamma * phi(after) - phi(before), phi = stages.weight * sum over slots of (potential of the stage + min(dwell_per_tick *
    ticks in it, dwell_cap)), 0 once the episode is over
    """
    return _shaping(record, stage_potential(record.before, config), stage_potential(record.after, config), config.gamma)


def _shaping(record: StepRecord, before_N: FloatArray, after_N: FloatArray, gamma: float) -> FloatArray:
    return gamma * np.where(record.ended_N, 0.0, after_N) - before_N
