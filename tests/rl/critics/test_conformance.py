"""Every kind of critic conforms, and the suite catches critics that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from morphogen.rl.critics import Critic, CriticConfig, config
from morphogen.rl.critics.base import check_level, check_rows, clipped_loss
from morphogen.testing import CRITIC_CHECKS, CriticCase, check_critic, critic_cases

CASES = critic_cases()


@pytest.mark.parametrize("check", CRITIC_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_conforms(case: CriticCase, check: Callable[[CriticCase], None]) -> None:
    check(case)


def test_every_line_of_the_table_is_a_kind_and_has_a_case() -> None:
    kinds = get_args(CriticConfig.model_fields["kind"].annotation)
    assert set(kinds) == set(config._KINDS) == {case.name.partition("-")[0] for case in CASES}
    assert {type(case.make()) for case in CASES} == {critic for critic, _ in config._KINDS.values()}


def test_settings_beside_their_defaults_get_cases_of_their_own() -> None:
    assert {str(case) for case in CASES} >= {"quantile-kappa=0", "quantile-monotone=True", "categorical-sigma=0"}


class Sound(Critic):
    """Eight quantiles, in the fewest words: what the tests below break in one place each."""

    is_distributional = True
    shares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_outputs = 8
        self.register_buffer("shares", (torch.arange(8) + 0.5) / 8, persistent=False)

    def value(self, outputs_BK: Tensor) -> Tensor:
        return outputs_BK.float().mean(-1)

    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        rising = outputs_BK.float().sort(-1).values
        return rising.repeat_interleave(num, -1).unflatten(-1, (num, 8)).mean(-1)

    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        error = targets_BS.detach().float().unsqueeze(-1) - points.unsqueeze(-2)
        return (torch.where(error < 0, 1 - self.shares, self.shares) * error.abs()).mean((-2, -1))

    def loss(
        self, outputs_BK: Tensor, targets_BS: Tensor, old_outputs_BK: Tensor | None = None, clip_range: float | None = None
    ) -> Tensor:
        check_rows(outputs_BK, targets_BS, 8)
        old = None if old_outputs_BK is None else old_outputs_BK.float()
        return clipped_loss(lambda points: self.row_loss(points, targets_BS), outputs_BK.float(), old, clip_range)

    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        check_level(level)
        return self.samples(outputs_BK, 8)[..., math.ceil(level * 8) - 1]

    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        check_level(level, least=0.05)
        return self.samples(outputs_BK, 400)[..., : round(level * 400)].mean(-1)

    def initial_bias(self) -> Tensor:
        return torch.zeros(8)


def test_a_sound_critic_passes() -> None:
    check_critic(Sound)


class KeepsTheHalf(Sound):
    def value(self, outputs_BK: Tensor) -> Tensor:
        return outputs_BK.mean(-1)


class ColumnOfValues(Sound):
    def value(self, outputs_BK: Tensor) -> Tensor:
        return super().value(outputs_BK).unsqueeze(-1)


class Scribbles(Sound):
    def value(self, outputs_BK: Tensor) -> Tensor:
        return super().value(outputs_BK.mul_(1.5))


class Broadcasts(Sound):
    def loss(self, outputs_BK: Tensor, targets_BS: Tensor, *clip: Any, **more: Any) -> Tensor:
        return super().loss(outputs_BK, targets_BS.expand(*outputs_BK.shape[:-1], targets_BS.shape[-1]), *clip, **more)


class Midpoints(Sound):
    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        ranks = ((torch.arange(num, device=outputs_BK.device) + 0.5) * 8 / num).long()
        return outputs_BK.float().sort(-1).values.index_select(-1, ranks)


class Rewards(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return super().row_loss(points, targets_BS) - 1


class Overflows(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return super().row_loss(points, targets_BS).exp()


class FirstTargetCounts(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return super().row_loss(points, targets_BS[..., :1])


class Couples(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return super().row_loss(points, targets_BS) / (1 + targets_BS.abs().mean())


class ClipsAlone(Sound):
    def loss(
        self, outputs_BK: Tensor, targets_BS: Tensor, old_outputs_BK: Tensor | None = None, clip_range: float | None = None
    ) -> Tensor:
        if old_outputs_BK is not None and clip_range is not None:
            near = old_outputs_BK.detach() + (outputs_BK - old_outputs_BK.detach()).clamp(-clip_range, clip_range)
            return super().loss(near, targets_BS)
        return super().loss(outputs_BK, targets_BS, old_outputs_BK, clip_range)


class IgnoresTheClip(Sound):
    def loss(self, outputs_BK: Tensor, targets_BS: Tensor, *clip: Any, **more: Any) -> Tensor:
        Sound.loss(self, outputs_BK, targets_BS, *clip, **more)
        return super().loss(outputs_BK, targets_BS)


class TakesHalfAClip(Sound):
    def loss(
        self, outputs_BK: Tensor, targets_BS: Tensor, old_outputs_BK: Tensor | None = None, clip_range: float | None = None
    ) -> Tensor:
        return super().loss(outputs_BK, targets_BS, old_outputs_BK, None if old_outputs_BK is None else clip_range or 0.2)


class PullsTargets(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return (targets_BS.float().unsqueeze(-1) - points.unsqueeze(-2)).abs().mean((-2, -1))


class HasWeights(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))


class DeafValue(Sound):
    def value(self, outputs_BK: Tensor) -> Tensor:
        return super().value(outputs_BK.detach())


class Hopeful(Sound):
    def initial_bias(self) -> Tensor:
        return torch.ones(8)


class OneBias(Sound):
    bias = torch.zeros(8)

    def initial_bias(self) -> Tensor:
        return self.bias.fill_(0.0) if self.bias[0] == 0 else self.bias


class LearnsTheMedian(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return (targets_BS.detach().unsqueeze(-1) - points.unsqueeze(-2)).abs().mean((-2, -1))


class LearnsNothing(Sound):
    def row_loss(self, points: Tensor, targets_BS: Tensor) -> Tensor:
        return super().row_loss(points, targets_BS) * 0 + (points * 1e-3).square().mean(-1)


class PlainTensor(Sound):
    def __init__(self) -> None:
        super().__init__()
        shares = self.shares
        del self.shares
        self.shares = shares


class SavesItsTable(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(8))


class Falls(Sound):
    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        check_level(level)
        return super().quantile(outputs_BK, 1.125 - max(0.125, level))


class UpperTail(Sound):
    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        return -super().cvar(-outputs_BK, level)


class TakesAnyLevel(Sound):
    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        return super().quantile(outputs_BK, min(max(level, 0.1), 1.0) if math.isfinite(level) else 0.5)


class GuessesATail(Sound):
    is_distributional = False

    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        return self.value(outputs_BK).unsqueeze(-1)

    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        check_level(level)
        return self.value(outputs_BK)


class Timid(Sound):
    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        check_level(level, least=0.6)
        return super().cvar(outputs_BK, level)


class UnderestimatesTheTail(Sound):
    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        return super().cvar(outputs_BK, level) if level == 1 else super().cvar(outputs_BK, level) - 0.2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (KeepsTheHalf, "value of torch.float16 outputs must be computed in float32"),
        (ColumnOfValues, r"value must be float32 \[6\], is torch.float32 \[6, 1\]"),
        (Scribbles, "outputs and targets must not be written to"),
        (Broadcasts, r"targets \[4\] of outputs \[4, 8\] must be a ValueError"),
        (Midpoints, "the mean of 1 samples must be the value"),
        (Rewards, "loss must be at least 0, is -"),
        (Overflows, "loss and gradient must be finite"),
        (FirstTargetCounts, "targets in another order must give the same loss"),
        (Couples, "loss of a row must not depend on other rows"),
        (ClipsAlone, "a clipped loss must not be below the plain one"),
        (IgnoresTheClip, "a clip range of 0.001 must have an effect"),
        (TakesHalfAClip, "old outputs alone, and a clip range alone, must be a ValueError"),
        (PullsTargets, "loss must have no gradient to the targets"),
        (HasWeights, "a critic must have no weights"),
        (DeafValue, "value must have a gradient to the outputs"),
        (Hopeful, "an untrained critic must expect about 0, expects 1"),
        (OneBias, "`initial_bias` must return a new tensor each time"),
        (LearnsTheMedian, "samples must scatter as returns do"),
        (LearnsNothing, "the value must be 0.7 within 0.1 after 400 steps"),
        (PlainTensor, "loss must run on meta, does not"),
        (SavesItsTable, r"`state_dict` must be empty, has \['table'\]"),
        (Falls, "quantile must not fall with the level"),
        (UpperTail, "cvar must not fall with the level"),
        (TakesAnyLevel, r"quantile must refuse levels outside of \(0, 1\]"),
        (GuessesATail, "quantile must be a ValueError, as nothing is known of how returns scatter"),
        (Timid, "cvar must take every level from some level on, 0.5 or less"),
        (UnderestimatesTheTail, "cvar at level 0.1 must be that of the samples, is off by 0.2"),
    ],
)
def test_a_broken_critic_is_caught(broken: type[Sound], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_critic(broken)


def test_a_density_may_have_a_negative_loss() -> None:
    for least, allowed in ((-math.inf, True), (0.0, False)):
        case = CriticCase("rewards", Rewards, least_loss=least)
        failed = []
        for check in CRITIC_CHECKS:
            try:
                check(case)
            except AssertionError as error:
                failed.append(str(error))
        assert (not failed) is allowed, failed
