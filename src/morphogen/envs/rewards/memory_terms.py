"""Terms that remember: ``(record, ledger, config) -> ([N], ledger)``. Pure, too: the ledger is given and given back.

Legend: N environments, S places for slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from morphogen.envs.frames import FloatArray
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards.config import RewardConfig
from morphogen.envs.rewards.ledger import Ledger
from morphogen.envs.rewards.terms import attribution, credited
from morphogen.growth import Stage
from morphogen.growth.lifecycle import LIVE


def escrow(record: StepRecord, ledger: Ledger, config: RewardConfig) -> tuple[FloatArray, Ledger]:
    """A seed is paid as it proves itself, and all of it goes back unless it becomes a fossil.

    Sum over slots of the change of the credit held. It moves towards credit.weight * tanh(max(credit, 0) / credit.scale), by at
    most escrow_max_step a tick; stays for good at FOSSILIZE; and is 0 after PRUNE and, unfossilised, at the end. ``credit`` is
    that of ``attribution``, as known after the step.
    """
    held_NS = ledger.credit_NS
    credit_NS = credited(record.after, config)
    target_NS = config.credit.weight * np.tanh(np.maximum(credit_NS, 0.0) / config.credit.scale)
    step_NS = np.clip(np.nan_to_num(target_NS - held_NS), -config.escrow_max_step, config.escrow_max_step)
    lives_NS = record.after.in_stage(tuple(LIVE)) & (record.after.slot("is_pruning") != 1.0) & ~record.ended_N[:, None]
    is_kept_NS = record.after.in_stage([Stage.FOSSILIZED])
    credit_NS = np.where(is_kept_NS, held_NS, np.where(lives_NS, held_NS + step_NS, 0.0))
    return (credit_NS - held_NS).sum(1), dataclasses.replace(ledger, credit_NS=credit_NS)


def drip(record: StepRecord, ledger: Ledger, config: RewardConfig) -> tuple[FloatArray, Ledger]:
    """The rest of a fossil's assessment is paid while it lasts, as far as it goes on contributing; never more than that.

    At FOSSILIZE drip.share * attribution, if positive, goes into a pool. Every later tick takes min(pool, rate) out of it, with
    rate = what went in / max(ticks left, drip.min_ticks), and pays that * contribution / contribution when fossilised, the
    fraction within [-1, 1].
    """
    portion_NS = np.minimum(ledger.rate_NS, ledger.pool_NS)
    is_open_NS = ledger.basis_NS > 0
    share_NS = np.clip(record.after.slot("contribution") / np.where(is_open_NS, ledger.basis_NS, 1.0), -1.0, 1.0)
    paid_N = np.where(is_open_NS, portion_NS * np.nan_to_num(share_NS), 0.0).sum(1)

    filled_N = config.drip.share * attribution(record, config)
    left_N = record.after.run("total_ticks") - record.after.run("tick")
    opens_NS = (filled_N > 0)[:, None] & (record.slot_N[:, None] == np.arange(record.after.num_slots))
    rate_N = filled_N / np.maximum(left_N, config.drip.min_ticks)
    pools = dataclasses.replace(
        ledger,
        pool_NS=np.where(opens_NS, filled_N[:, None], ledger.pool_NS - portion_NS),
        rate_NS=np.where(opens_NS, rate_N[:, None], ledger.rate_NS),
        basis_NS=np.where(opens_NS, record.before.slot("contribution"), ledger.basis_NS),
    )
    return paid_N, pools


def loss_gain(record: StepRecord, ledger: Ledger, config: RewardConfig) -> tuple[FloatArray, Ledger]:
    """A falling loss pays at once, a rising one costs, an unchanged one is nothing; ``loss_terminal`` settles it at the end.

    loss.weight * (loss before - loss after) / (baseline - target), the fraction within [-max_step, max_step], 0 where a loss is
    not known. What was paid so is an advance: with interest, advance' = advance / gamma + paid, all of it goes back at the
    end, so that its discounted sum over an episode is 0.
    """
    fell_N = (record.before.run("loss") - record.after.run("loss")) / (config.loss.baseline - config.loss.target)
    known_N = np.isfinite(fell_N)
    fell_N = np.clip(np.where(known_N, fell_N, 0.0), -config.loss.max_step, config.loss.max_step)
    owed_N = ledger.advance_N / config.gamma
    paid_N = np.where(record.ended_N, -owed_N, config.loss.weight * fell_N)
    return paid_N, dataclasses.replace(ledger, advance_N=owed_N + paid_N)
