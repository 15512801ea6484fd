"""Every distribution over actions conforms, and the suite catches distributions that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete
from torch import Tensor

from morphogen.rl.actions import (
    ActionConfig,
    ActionDistribution,
    Evaluation,
    FactoredDistribution,
    GaussianDistribution,
    HeadConfig,
    SquashedGaussianDistribution,
)
from morphogen.rl.actions.heads import lay_out
from morphogen.testing import ACTION_CHECKS, ActionCase, action_cases, check_actions
from morphogen.testing.actions import check_masks

CASES = action_cases()
BOX = Box(-1.0, 1.0, (2,))
SPACE = MultiDiscrete([3, 4])
HEADS = (HeadConfig(name="op"), HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2)}))


@pytest.mark.parametrize("check", ACTION_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_distribution_conforms(case: ActionCase, check: Callable[[ActionCase], None]) -> None:
    check(case)


def test_every_distribution_and_every_setting_has_a_case() -> None:
    kinds = {kind for kind in ActionDistribution.__subclasses__() if kind.__module__.startswith("morphogen.")}
    assert {type(case.make()) for case in CASES} == kinds
    configs = [case.make.args[1] for case in CASES]  # type of a partial
    for name, field in ActionConfig.model_fields.items():
        assert any(getattr(config, name) != field.default for config in configs), name


class Choices(FactoredDistribution):
    """A distribution that is built without arguments: what the tests below break in one place each."""

    def __init__(self) -> None:
        super().__init__(lay_out([3, 4], HEADS), 0.0, np.zeros(2, np.int64), (2,), np.dtype(np.int64))


class Numbers(GaussianDistribution):
    def __init__(self) -> None:
        super().__init__(BOX, 0.0)


class Squashed(SquashedGaussianDistribution):
    def __init__(self) -> None:
        super().__init__(BOX, 0.0)


def test_sound_distributions_pass() -> None:
    check_actions(Choices, SPACE)
    check_actions(Numbers, BOX)
    check_actions(Squashed, BOX, density="env")


def test_a_density_on_another_scale_than_declared_is_caught() -> None:
    with pytest.raises(AssertionError, match="the density must integrate to 1, a mean weight must be 1 on average"):
        check_actions(Squashed, BOX)


class StoresShortIntegers(Choices):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(outputs_BA, noise, mask_BM).int()


class SumsHeads(Choices):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        result = super().evaluate(outputs_BA, actions, mask_BM)
        return Evaluation(result.log_prob_BH.sum(1, keepdim=True), result.entropy_BH, result.relevant_BH)


class NarrowMask(Choices):
    def __init__(self) -> None:
        super().__init__()
        self.mask_width = 3


class OneNoiseForAll(Choices):
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        noise = super().noise((1,) * len(shape), generator)
        return noise.expand(*shape, noise.shape[-1])


class GlobalNoise(Numbers):
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, 2)


class BatchMode(Numbers):
    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(outputs_BA, mask_BM) - outputs_BA.float().mean()


class BatchNoise(Numbers):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(outputs_BA, noise - noise.mean(0), mask_BM)


class SamplesTheMode(Choices):
    def sample(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        actions = self.mode(outputs_BA, mask_BM)
        return actions, self.evaluate(outputs_BA, actions, mask_BM).log_prob_BH


class LoudLogProb(Choices):
    def sample(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        actions, log_prob_BH = super().sample(outputs_BA, noise, mask_BM)
        return actions, log_prob_BH + 1e-3


class NotNormalised(Choices):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        result = super().evaluate(outputs_BA, actions, mask_BM)
        return Evaluation(result.log_prob_BH - 0.01, result.entropy_BH, result.relevant_BH)


class TooHot(Choices):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(0.7 * outputs_BA, noise, mask_BM)


class ForgetsAConstant(Numbers):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        result = super().evaluate(outputs_BA, actions, mask_BM)
        return Evaluation(result.log_prob_BH + 0.92, result.entropy_BH)


class TooWide(Numbers):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(outputs_BA, 1.2 * noise, mask_BM)


class ForgetsTheSlope(Squashed):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        return self.gaussian.evaluate(outputs_BA, actions, mask_BM)


class WorstFirst(Choices):
    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(-outputs_BA, mask_BM)


class ModeIgnoresTheMask(Choices):
    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(outputs_BA)


class EntropyInBits(Choices):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        result = super().evaluate(outputs_BA, actions, mask_BM)
        return Evaluation(result.log_prob_BH, result.entropy_BH / np.log(2), result.relevant_BH)


class KlOfDrawn(Choices):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return super().kl(outputs_new_BA, outputs_old_BA, mask_BM, snapshot_old)


class KlGap(Choices):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return super().kl(outputs_old_BA, outputs_new_BA, mask_BM, snapshot_old) + 0.1


class KlBelowZero(Choices):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return -super().kl(outputs_old_BA, outputs_new_BA, mask_BM, snapshot_old)


class KlWithoutSpread(Numbers):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return super().kl(outputs_old_BA, outputs_new_BA, mask_BM)


class LiveSnapshot(Numbers):
    def snapshot(self) -> Tensor:
        return self.log_std_A.detach()


class TakesASnapshot(Choices):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return super().kl(outputs_old_BA, outputs_new_BA, mask_BM)


class DetachesOld(Choices):
    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        old_BA = outputs_old_BA.detach() + 0 * outputs_old_BA
        return super().kl(old_BA, outputs_new_BA, mask_BM, snapshot_old)


class IgnoresMasks(Choices):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(outputs_BA, noise)

    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(outputs_BA)

    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        return super().evaluate(outputs_BA, actions)

    def kl(self, outputs_old_BA: Tensor, outputs_new_BA: Tensor, mask_BM: Any = None, snapshot_old: Any = None) -> Tensor:
        return super().kl(outputs_old_BA, outputs_new_BA, None, snapshot_old)


class Penalises(Choices):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        # Enough for outputs of ordinary size.
        return super().draw(outputs_BA if mask_BM is None else outputs_BA.float() - 1e4 * ~mask_BM, noise)


class DrawIgnoresTheMask(Choices):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().draw(outputs_BA, noise)


class LeaksGradient(Choices):
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        result = super().evaluate(outputs_BA, actions, mask_BM)
        leak = outputs_BA.float().sum(1, keepdim=True)
        return Evaluation(result.log_prob_BH + (leak - leak.detach()), result.entropy_BH, result.relevant_BH)


class TakesAMask(Numbers):
    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(outputs_BA)


class TurnsMasks(Choices):
    def flatten_mask(self, value: object, num_envs: int) -> Any:
        return ~super().flatten_mask(value, num_envs)


class TakesAnyWidth(Choices):
    def flatten_mask(self, value: object, num_envs: int) -> Any:
        return np.asarray(value)


class Unclipped(Numbers):
    def to_env(self, actions: Tensor) -> Any:
        return actions.numpy().copy()


class DoublePrecisionForTheEnv(Numbers):
    def to_env(self, actions: Tensor) -> Any:
        return super().to_env(actions).astype(np.float64)


class LendsItsActions(Choices):
    def to_env(self, actions: Tensor) -> Any:
        return actions.numpy()


class HalfSpread(Numbers):
    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        super().draw(outputs_BA, noise, mask_BM)
        rounded = torch.addcmul(outputs_BA, self.log_std_A.exp().to(outputs_BA.dtype), noise.to(outputs_BA.dtype))
        return rounded.float()


class SavesItsTables(Choices):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3))


class KeepsItsStart(Choices):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = torch.zeros(3)

    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        return super().mode(outputs_BA + self.offsets.repeat(5), mask_BM)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (StoresShortIntegers, r"drawn actions must be torch.int64 \[1, 2\], are torch.int32 \[1, 2\]"),
        (SumsHeads, r"log-probabilities must be torch.float32 \[1, 2\], are torch.float32 \[1, 1\]"),
        (NarrowMask, "a mask must have an entry for each output, or none"),
        (OneNoiseForAll, "rows must have noise of their own"),
        (GlobalNoise, "noise must come from the given generator, a global one moved"),
        (BatchMode, "the mode of a row must not depend on other rows"),
        (BatchNoise, "the drawn action of a row must not depend on other rows"),
        (SamplesTheMode, "a sample must be what `draw` gives"),
        (LoudLogProb, "log-probabilities of a sample must be those of `evaluate`"),
        (NotNormalised, "probabilities of all actions that come up must sum to 1"),
        (TooHot, "must come up with its probability"),
        (ForgetsAConstant, "the density must integrate to 1"),
        (TooWide, "actions must come up as the density says"),
        (ForgetsTheSlope, "the density must integrate to 1"),
        (WorstFirst, "the first choice of the mode must be the most probable"),
        (ModeIgnoresTheMask, "the mode must be possible"),
        (EntropyInBits, r"entropy \+ log-probability must be 0 on average"),
        (KlOfDrawn, "log old - log new must be"),
        (KlGap, "kl of equal outputs must be 0, is 0.1"),
        (KlBelowZero, "kl must not be negative"),
        (KlWithoutSpread, "log old - log new once parameters moved must be"),
        (LiveSnapshot, "log old - log new once parameters moved must be"),
        (TakesASnapshot, "`snapshot_old` must be refused"),
        (DetachesOld, "kl must have a gradient to the outputs"),
        (IgnoresMasks, "outputs of what is forbidden must not count for the drawn action"),
        (Penalises, "outputs of what is forbidden must not count for the drawn action"),
        (DrawIgnoresTheMask, "must come up with its probability 0, does with"),
        (LeaksGradient, "gradients of what is forbidden must be exactly 0"),
        (TakesAMask, "`mode` must refuse a mask with ValueError"),
        (TurnsMasks, "a flat mask must be taken as it is"),
        (TakesAnyWidth, "a mask of another width must be a ValueError"),
        (Unclipped, r"a drawn action must be in Box\(-1.0, 1.0, \(2,\), float32\), .* is not"),
        (DoublePrecisionForTheEnv, r"actions must be float32 \[32, \*\(2,\)\], are float64"),
        (LendsItsActions, "`to_env` must return a new array"),
        (HalfSpread, "the drawn action of torch.float16 outputs must be computed in float32"),
        (SavesItsTables, r"`state_dict` must have the parameters alone, has also \['table'\]"),
        (KeepsItsStart, "everything must run on meta, does not"),
    ],
)
def test_a_broken_distribution_is_caught(broken: type[ActionDistribution], message: str) -> None:
    space = SPACE if issubclass(broken, Choices) else BOX
    density = "env" if issubclass(broken, Squashed) else "stored"
    with pytest.raises(AssertionError, match=message):
        check_actions(broken, space, density=density)


def test_what_is_forbidden_is_caught_by_the_check_of_masks_too() -> None:
    with pytest.raises(AssertionError, match="what is forbidden must never be drawn"):
        check_masks(ActionCase("actions", SPACE, DrawIgnoresTheMask))


@pytest.mark.parametrize("case", [case for case in CASES if case.make().mask_width], ids=str)
def test_masks_of_a_case_are_accepted_and_forbid_about_what_they_should(case: ActionCase) -> None:
    actions, half, most = case.make(), case.mask(64), case.mask(64, share=1.0)
    assert half is not None and most is not None
    for mask in (half, most):
        actions.check_mask(mask.numpy())
    assert 0.4 < half.float().mean().item() < 0.75
    assert most.sum(1).min() >= 1 and most.sum() < half.sum()
    everything = case.mask(3, share=0.0)
    assert everything is not None and everything.all()
