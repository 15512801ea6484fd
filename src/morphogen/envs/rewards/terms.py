"""Terms that are functions of the record of a step alone: ``(record, config) -> [N]``, in points. Pure.

The first paragraph of a docstring says what a term is for, the second is its formula: the tables of the docs are made of them.

Legend: N environments, S places for slots.
"""

from __future__ import annotations

import numpy as np

from morphogen.control import Op
from morphogen.envs.frames import FloatArray, Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards.config import RewardConfig
from morphogen.growth import Stage


def terminal(record: StepRecord, config: RewardConfig) -> FloatArray:
    """What it is all about: how far the metric has come when the episode is over; its level, not its last change.

    At the end: metric_weight * (metric - start_metric) * gamma^(ticks left). Ticks are left after a fault alone: it then counts
    as if the network had stayed as it is, so that ending early is no way to be paid early.
    """
    gained_N = record.after.run("metric") - record.after.run("start_metric")
    return at_the_end(record, config.metric_weight * np.where(np.isfinite(gained_N), gained_N, 0.0), config)


def rent(record: StepRecord, config: RewardConfig) -> FloatArray:
    """What was grown costs as long as it is there, and more the more it acts. The host is free.

    -rent.weight / total_ticks * ln(1 + counted / max(host_parameters, host_floor)). Of the parameters of a seed are counted
    the share incubation_share + (1 - incubation_share) * alpha, of a fossil all.
    """
    after, least = record.after, config.rent.incubation_share
    acting_NS = least + (1.0 - least) * np.nan_to_num(after.slot("alpha"))
    share_NS = np.where(after.in_stage([Stage.FOSSILIZED]), 1.0, acting_NS)
    counted_N = (share_NS * _seed_parameters(after)).sum(1)
    return -config.rent.weight / after.run("total_ticks") * _relative_growth(counted_N, after, config)


def final_rent(record: StepRecord, config: RewardConfig) -> FloatArray:
    """What is there when the episode is over costs as if it had been there throughout. The way to it is free.

    At the end: -rent.weight * ln(1 + parameters of all seeds / max(host_parameters, host_floor)) * gamma^(ticks left).
    """
    growth_N = _relative_growth(_seed_parameters(record.after).sum(1), record.after, config)
    return at_the_end(record, -config.rent.weight * growth_N, config)


def attribution(record: StepRecord, config: RewardConfig) -> FloatArray:
    """A fossil is assessed once, when it becomes one: by what it is given credit for, and negative where it does harm.

    At FOSSILIZE: credit.weight * tanh(credit / credit.scale), if positive times min(1, ticks in HOLDING / maturity_ticks).
    credit = min(contribution - error_z * its error, metric - metric_at_birth, metric - all_off_metric), as known when the
    action was chosen; the metric of the middle one is the least of the last three.
    """
    worth_N = np.nan_to_num(np.tanh(record.at_slot(credited(record.before, config)) / config.credit.scale))
    maturity_N = np.minimum(
        1.0, np.nan_to_num(record.at_slot(record.before.slot("ticks_in_stage"))) / config.credit.maturity_ticks
    )
    paid_N = config.credit.weight * np.where(worth_N > 0, worth_N * maturity_N, worth_N)
    return np.where(has_fossilized(record), paid_N, 0.0)


def attribution_at_once(record: StepRecord, config: RewardConfig) -> FloatArray:
    """The part of a fossil's assessment that is paid at once; ``drip`` pays the rest. All of it where it is negative.

    (1 - drip.share) * attribution if positive, else attribution.
    """
    paid_N = attribution(record, config)
    return np.where(paid_N > 0, (1.0 - config.drip.share) * paid_N, paid_N)


def fossils(record: StepRecord, config: RewardConfig) -> FloatArray:
    """At the end, how many fossils there are that deserve credit; saturating, so that number is no substitute for metric.

    At the end: credit.weight * tanh(number of fossils with a credit above 0) * gamma^(ticks left).
    """
    deserving_NS = record.after.in_stage([Stage.FOSSILIZED]) & (credited(record.after, config) > 0)
    return at_the_end(record, config.credit.weight * np.tanh(deserving_NS.sum(1)), config)


def churn(record: StepRecord, config: RewardConfig) -> FloatArray:
    """Sowing, weeding and turning at alpha cost a little each, so that doing and undoing never pays.

    -churn.germinate, -churn.prune or -churn.retarget for GERMINATE, PRUNE and SET_ALPHA_TARGET.
    """
    cost = np.zeros(len(Op))
    cost[[Op.GERMINATE, Op.PRUNE, Op.SET_ALPHA_TARGET]] = config.churn.germinate, config.churn.prune, config.churn.retarget
    return -cost[record.op_N]


def activity(record: StepRecord, config: RewardConfig) -> FloatArray:
    """Every action but WAIT costs the same.

    -activity_cost for any op but WAIT.
    """
    return np.where(record.op_N != Op.WAIT, -config.activity_cost, 0.0)


def hasty_prune(record: StepRecord, config: RewardConfig) -> FloatArray:
    """A seed that is pruned before it could show anything was sown in vain.

    At PRUNE: -hasty_prune.cost if the seed is younger than hasty_prune.ticks.
    """
    is_young_N = record.at_slot(record.before.slot("age_ticks")) < config.hasty_prune.ticks
    return np.where((record.op_N == Op.PRUNE) & is_young_N, -config.hasty_prune.cost, 0.0)


def alpha_shock(record: StepRecord, config: RewardConfig) -> FloatArray:
    """A jump of alpha disturbs what the host has learned: squares make a slow ramp cheaper than a fast one.

    -alpha_shock * sum over slots of (change of alpha)^2 * ln(1 + parameters / max(host_parameters, host_floor)); not where a
    fault rewound alpha.
    """
    before, after = record.before, record.after
    change_NS = np.nan_to_num(after.slot("alpha")) - np.nan_to_num(before.slot("alpha"))
    parameters_NS = np.maximum(_seed_parameters(before), _seed_parameters(after))
    shock_N = (change_NS**2 * _relative_growth(parameters_NS, after, config)).sum(1)
    return np.where(record.faulty_N, 0.0, -config.alpha_shock * shock_N)


def fault(record: StepRecord, config: RewardConfig) -> FloatArray:
    """Driving a run into a fault ends it, and costs; a seed that the governor had to take out costs less.

    -fault_penalty where the episode ended by a fault, -quarantine_penalty for each seed quarantined.
    """
    quarantined_N = np.nan_to_num(record.after.run("quarantined"))
    return -config.fault_penalty * record.faulty_N - config.quarantine_penalty * quarantined_N


def loss_terminal(record: StepRecord, config: RewardConfig) -> FloatArray:
    """How far the training loss has come when the episode is over.

    At the end: loss.weight * (baseline - loss) / (baseline - target), the fraction within [-1, 1], * gamma^(ticks left); the
    loss of the tick before where the last one is not a number.
    """
    last_N, earlier_N = record.after.run("loss"), record.before.run("loss")
    loss_N = np.where(np.isfinite(last_N), last_N, np.where(np.isfinite(earlier_N), earlier_N, config.loss.baseline))
    reached_N = np.clip((config.loss.baseline - loss_N) / (config.loss.baseline - config.loss.target), -1.0, 1.0)
    return at_the_end(record, config.loss.weight * reached_N, config)


# -- what terms are made of -------------------------------------------------------------------------------------------


def credited(frames: Frames, config: RewardConfig) -> FloatArray:
    """Return what each seed is given credit for, in units of the metric, [N, S]; NaN where no contribution is known.

    The least of three bounds: what is lost without the seed, less ``error_z`` standard errors, since measuring often and
    taking the best is not merit; what the run gained since the seed was sown, as a host that leans on a seed loses more
    without it than it ever gained by it; and what all seeds give together, as one that the host cannot do without may still
    hurt the whole ("ransomware").
    """
    contribution_NS, error_NS = frames.slot("contribution"), frames.slot("contribution_error")
    surely_NS = contribution_NS
    if config.credit.error_z > 0:
        known_NS = np.isfinite(error_NS)
        surely_NS = np.where(
            known_NS,
            contribution_NS - config.credit.error_z * np.where(known_NS, error_NS, 0.0),
            np.minimum(contribution_NS, 0.0),
        )
    steady_N = np.fmin(np.fmin(frames.run("metric"), frames.run("metric_1")), frames.run("metric_2"))
    since_birth_NS = steady_N[:, None] - frames.slot("metric_at_birth")
    together_N = frames.run("metric") - frames.run("all_off_metric")
    bounded_NS = np.fmin(np.fmin(surely_NS, since_birth_NS), together_N[:, None])
    return np.where(np.isnan(contribution_NS), np.nan, bounded_NS)


def has_fossilized(record: StepRecord) -> FloatArray:
    """Return where a seed was fossilised and, after a fault that rewound the run, still is, [N]."""
    return (record.op_N == Op.FOSSILIZE) & (record.at_slot(record.after.slot("stage")) == Stage.FOSSILIZED)


def at_the_end(record: StepRecord, points_N: FloatArray, config: RewardConfig) -> FloatArray:
    """Return ``points_N`` * gamma^(ticks left) where the episode is over, else 0, [N]."""
    left_N = np.maximum(record.before.run("total_ticks") - 1.0 - record.before.run("tick"), 0.0)
    return np.where(record.ended_N, points_N * config.gamma**left_N, 0.0)


def _seed_parameters(frames: Frames) -> FloatArray:
    return np.nan_to_num(frames.slot("parameters"))


def _relative_growth(parameters: FloatArray, frames: Frames, config: RewardConfig) -> FloatArray:
    """Return ln(1 + parameters / host's) of [N] or [N, S]."""
    host_N = np.maximum(frames.run("host_parameters"), config.rent.host_floor)
    return np.log1p(parameters / host_N.reshape(-1, *[1] * (parameters.ndim - 1)))
