"""The conformance suite of critics: what every one of them promises of values, samples, losses and readouts.

Call :func:`check_critic` for a critic of your own, or let pytest show each check by itself::

    @pytest.mark.parametrize("check", CRITIC_CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("case", critic_cases(), ids=str)
    def test_critic(case, check):
        check(case)

Shapes: B rows, K outputs of a critic, S samples of a return.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from morphogen.rl.critics import Critic, CriticConfig, make

LEVELS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Levels of readouts; the low ones may be refused, those from 0.5 on may not."""
NO_LEVELS = (0.0, -0.1, 1.1, math.nan)
LARGEST_START = 0.1
"""What an untrained critic may expect, in deviations of returns."""
LEARNING_STEPS = 400
LEARNING_RATE = 0.05
LEARNED = 0.1
"""How near to the mean of its targets a value must come."""
LEARNED_SPREAD = 0.4
"""Share by which the deviation of what was learned may be off."""
FINE = 200
"""Samples with which readouts are compared; LEVELS are whole numbers of them."""
ROUNDING = 1e-3
"""Share of the spread of samples by which they may be off when a distribution is cut into so many parts in float32."""
TIE = 1e-4
_NO_VARIANTS = ("kind", "twin", "low", "high")  # twins are the caller's; targets have to be between low and high


@dataclasses.dataclass(frozen=True)
class CriticCase:
    """A kind of critic with its settings, for returns that are normalised to deviation 1.

    Attributes:
        name: Of messages, and the id of a test.
        make: Returns a new critic, equal each time.
        least_loss: The loss of a row is never below this; -inf for a critic that is fitted by a density.
    """

    name: str
    make: Callable[[], Critic]
    least_loss: float = 0.0

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def outputs(self, *rows: int, seed: int = 0) -> Tensor:
        """Return random outputs, [*rows, K]; equal for equal seeds."""
        return _noise((*rows, self.make().num_outputs), seed)


def critic_cases() -> tuple[CriticCase, ...]:
    """Return a case for each kind of :class:`~morphogen.rl.critics.CriticConfig`, and for settings beside their defaults.

    Of each kind: each bool the other way round, and each number at 0 where that is allowed; all alone. So a new kind is
    covered by being one.

    Example:
        >>> [str(case) for case in critic_cases()][:3]
        ['scalar', 'quantile', 'quantile-kappa=0']
    """
    kinds = get_args(CriticConfig.model_fields["kind"].annotation)
    configs = {name: config for kind in kinds for name, config in _configs(kind)}
    return tuple(CriticCase(name, functools.partial(make, config)) for name, config in configs.items())


def _configs(kind: Any) -> Iterator[tuple[str, CriticConfig]]:
    yield kind, CriticConfig(kind=kind)
    for name, field in CriticConfig.model_fields.items():
        if name in _NO_VARIANTS or not isinstance(field.default, (bool, int, float)):
            continue
        settings: dict[str, Any] = {name: not field.default if isinstance(field.default, bool) else 0}
        try:
            yield f"{kind}-{name}={settings[name]}", CriticConfig(kind=kind, **settings)
        except ValueError:
            continue  # without effect on this kind, or 0 is not allowed


def check_critic(make_critic: Callable[[], Critic], name: str = "critic") -> None:
    """Run every check on a critic.

    Args:
        make_critic: Returns a new critic, equal each time.
        name: Of messages.

    Raises:
        AssertionError: A check failed; the message says which, and what was expected and found.

    Example:
        >>> check_critic(lambda: make(CriticConfig(kind="quantile", num_quantiles=8)))
    """
    for check in CRITIC_CHECKS:
        check(CriticCase(name, make_critic))


def check_shapes(case: CriticCase) -> None:
    """Value and loss are float32 of the shape of the rows, whatever that is; samples have S more; nothing is written to."""
    critic = case.make()
    for rows, num in itertools.product(((6,), (1,), (3, 4)), (1, 5, 64)):
        outputs, targets = case.outputs(*rows), _noise((*rows, num), 1)
        before = outputs.clone(), targets.clone()
        width = num if critic.is_distributional else 1
        for what, found, shape in (
            ("value", critic.value(outputs), rows),
            ("samples", critic.samples(outputs, num), (*rows, width)),
            ("loss", critic.loss(outputs, targets), rows),
        ):
            right = found.shape == shape and found.dtype == torch.float32
            assert right, f"{case}: {what} must be float32 {list(shape)}, is {found.dtype} {list(found.shape)}."
        flat = critic.loss(outputs.reshape(-1, critic.num_outputs), targets.reshape(-1, num)).view(rows)
        assert _close(critic.loss(outputs, targets), flat), f"{case}: rows must be the same in any shape {list(rows)}."
        kept = torch.equal(outputs, before[0]) and torch.equal(targets, before[1])
        assert kept, f"{case}: outputs and targets must not be written to."


def check_refuses_other_rows(case: CriticCase) -> None:
    """Targets whose rows are not those of the outputs are a ValueError: broadcasting would couple rows."""
    critic, outputs = case.make(), case.outputs(4)
    for targets in (torch.zeros(4), torch.zeros(1, 4), torch.zeros(4, 1, 1)):
        refused = _refused(lambda targets=targets: critic.loss(outputs, targets))
        assert refused, f"{case}: targets {list(targets.shape)} of outputs {list(outputs.shape)} must be a ValueError."


def check_samples_have_the_value(case: CriticCase) -> None:
    """The mean of the samples is the value, however many there are."""
    critic, outputs = case.make(), case.outputs(6)
    for num in (1, 2, 7, critic.num_outputs, FINE):
        worst = float((critic.samples(outputs, num).mean(-1) - critic.value(outputs)).detach().abs().max())
        assert worst < TIE, f"{case}: the mean of {num} samples must be the value, is off by {worst:.3g}."


def check_loss_bounded(case: CriticCase) -> None:
    """The loss of a row is finite, as its gradient is, and never below :attr:`CriticCase.least_loss`."""
    critic = case.make()
    for scale, spread in itertools.product((0.0, 1.0, 100.0), (0.0, 1.0, 100.0)):
        outputs = (scale * case.outputs(32)).requires_grad_()
        losses = critic.loss(outputs, spread * _noise((32, 3), 1))
        what = f"outputs of scale {scale:g}, targets of scale {spread:g}"
        least = float(losses.detach().min())
        assert least >= case.least_loss - 1e-6, f"{case}: loss must be at least {case.least_loss:g}, is {least:.3g} ({what})."
        (gradient,) = torch.autograd.grad(losses.sum(), outputs)
        finite = losses.isfinite().all() and gradient.isfinite().all()
        assert finite, f"{case}: loss and gradient must be finite ({what})."


def check_targets_equally_likely(case: CriticCase) -> None:
    """The targets of a row are a sample: neither their order nor saying all of them twice changes its loss."""
    critic, outputs, targets = case.make(), case.outputs(6), _noise((6, 4), 1)
    plain = critic.loss(outputs, targets)
    for what, same in (("in another order", targets.flip(-1)), ("given twice", torch.cat((targets, targets), -1))):
        assert _close(critic.loss(outputs, same), plain), f"{case}: targets {what} must give the same loss."


def check_rows_independent(case: CriticCase) -> None:
    """What other rows hold changes nothing in a row, and its loss has no gradient to them."""
    critic, outputs, targets = case.make(), case.outputs(6), _noise((6, 3), 1)
    others = (torch.cat((outputs[:1], 5 - 3 * outputs[1:])), torch.cat((targets[:1], 5 - 3 * targets[1:])))
    for what, read in _readings(critic):
        mine, again = read(outputs, targets)[0], read(*others)[0]
        assert _close(mine, again), f"{case}: {what} of a row must not depend on other rows."
    live = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic.loss(live, targets)[0], live)
    assert not gradient[1:].any(), f"{case}: the loss of a row must have no gradient to the outputs of others."


def _readings(critic: Critic) -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    return [
        ("value", lambda outputs, targets: critic.value(outputs)),
        ("samples", lambda outputs, targets: critic.samples(outputs, 5)),
        ("loss", critic.loss),
    ]


def check_clipping(case: CriticCase) -> None:
    """With a clip range the loss of no row is lower, and unchanged within the range; or clipping is refused with ValueError.

    Half of a clip, old outputs or a range alone, is refused in any case.
    """
    critic, outputs, old, targets = case.make(), case.outputs(64), case.outputs(64, seed=2), _noise((64, 3), 1)
    halves = _refused(lambda: critic.loss(outputs, targets, old)), _refused(lambda: critic.loss(outputs, targets, None, 0.2))
    assert all(halves), f"{case}: old outputs alone, and a clip range alone, must be a ValueError."
    if _refused(lambda: critic.loss(outputs, targets, old, 0.2)):
        return
    plain = critic.loss(outputs, targets)
    for clip_range in (1e-3, 0.2, 5.0):
        gap = critic.loss(outputs, targets, old, clip_range) - plain
        assert gap.min() > -1e-5, f"{case}: a clipped loss must not be below the plain one, is by {-float(gap.min()):.3g}."
        assert clip_range > 1 or gap.max() > 0, f"{case}: a clip range of {clip_range} must have an effect."
    near = critic.loss(outputs, targets, outputs + 1e-4, 0.5)
    assert _close(near, plain), f"{case}: clipping must change nothing where predictions moved by less than the range."


def check_gradient_to_outputs_alone(case: CriticCase) -> None:
    """Value and loss have a gradient to the outputs, and to nothing else: not to targets, old outputs or weights."""
    critic = case.make()
    assert not list(critic.parameters()), f"{case}: a critic must have no weights."
    outputs, old = case.outputs(6).requires_grad_(), case.outputs(6, seed=2).requires_grad_()
    targets = _noise((6, 3), 1).requires_grad_()
    results = [("value", critic.value(outputs)), ("loss", critic.loss(outputs, targets))]
    if not _refused(lambda: critic.loss(outputs, targets, old, 0.2)):
        results.append(("clipped loss", critic.loss(outputs, targets, old, 0.2)))
    for what, result in results:
        assert result.requires_grad, f"{case}: {what} must have a gradient to the outputs."
        found = torch.autograd.grad(result.sum(), (outputs, targets, old), allow_unused=True, materialize_grads=True)
        reached = [bool(gradient.any()) for gradient in found]
        assert reached[0], f"{case}: {what} must have a gradient to the outputs."
        assert not reached[1], f"{case}: {what} must have no gradient to the targets. Detach them."
        assert not reached[2], f"{case}: {what} must have no gradient to the old outputs. Detach them."


def check_start(case: CriticCase) -> None:
    """With its initial bias, a new tensor each time, a critic expects a return of about 0."""
    critic = case.make()
    bias = critic.initial_bias()
    assert bias.shape == (critic.num_outputs,), f"{case}: the bias must be [{critic.num_outputs}], is {list(bias.shape)}."
    expects = float(critic.value(bias.unsqueeze(0)).detach())
    assert abs(expects) <= LARGEST_START, f"{case}: an untrained critic must expect about 0, expects {expects:.3g}."
    kept = bias.clone()
    bias.fill_(9.0)
    assert torch.equal(critic.initial_bias(), kept), f"{case}: `initial_bias` must return a new tensor each time."


def check_learns(case: CriticCase) -> None:
    """A few hundred steps of regression teach a constant return, the order of two rewards, and how they scatter."""
    critic = case.make()
    scatter = torch.linspace(-0.8, 0.8, 8)
    targets = torch.stack((torch.full((8,), 0.7), 1.0 + scatter, -0.5 + scatter))
    outputs = nn.Parameter(critic.initial_bias().repeat(3, 1))
    optimizer = torch.optim.Adam([outputs], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, LEARNING_STEPS)
    for _ in range(LEARNING_STEPS):
        optimizer.zero_grad()
        critic.loss(outputs, targets).sum().backward()
        optimizer.step()
        schedule.step()
    constant, high, low = critic.value(outputs.detach()).tolist()
    for learned, mean in ((constant, 0.7), (high, 1.0), (low, -0.5)):
        near = abs(learned - mean) <= LEARNED
        assert near, f"{case}: the value must be {mean} within {LEARNED} after {LEARNING_STEPS} steps, is {learned:.3g}."
    assert high > constant > low, f"{case}: values must be in the order of the returns, are {high}, {constant}, {low}."
    if critic.is_distributional:
        share = float(critic.samples(outputs.detach(), FINE)[1].std(correction=0) / scatter.std(correction=0))
        assert abs(share - 1) <= LEARNED_SPREAD, f"{case}: samples must scatter as returns do, do {share:.3g} times as far."


def check_low_precision(case: CriticCase) -> None:
    """Outputs of half precision, and autocast, give what their values give in float32, and finite gradients."""
    critic, targets = case.make(), _noise((6, 3), 1)
    for dtype in (torch.float16, torch.bfloat16):
        outputs = case.outputs(6).to(dtype).requires_grad_()
        for what, read in _readings(critic):
            found, expected = read(outputs, targets), read(outputs.float(), targets)
            same = found.dtype == torch.float32 and torch.equal(found, expected)
            assert same, f"{case}: {what} of {dtype} outputs must be computed in float32."
        (gradient,) = torch.autograd.grad(critic.loss(outputs, targets).sum(), outputs)
        right = gradient.dtype == dtype and gradient.isfinite().all()
        assert right, f"{case}: the gradient to {dtype} outputs must be finite and {dtype}."
    outputs = case.outputs(6)
    with torch.autocast("cpu", torch.bfloat16):
        found = [read(outputs, targets) for _, read in _readings(critic)]
    for (what, read), result in zip(_readings(critic), found, strict=True):
        assert torch.equal(result, read(outputs, targets)), f"{case}: {what} must be computed in float32 under autocast too."


def check_devices(case: CriticCase) -> None:
    """Constants follow the critic to another device, and what it computes is on the device of the outputs."""
    for device in ("meta", *(("cuda",) if torch.cuda.is_available() else ())):
        critic, outputs, targets = case.make().to(device), case.outputs(6).to(device), _noise((6, 3), 1).to(device)
        for what, read in [*_readings(critic), *_readouts(critic, 1.0)]:
            try:
                found = read(outputs, targets)
            except (RuntimeError, NotImplementedError) as error:
                raise AssertionError(f"{case}: {what} must run on {device}, does not: {error}. Register constants.") from error
            assert found.device.type == device, f"{case}: {what} of outputs on {device} must be there, is on {found.device}."


def _readouts(critic: Critic, level: float) -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    if not critic.is_distributional:
        return []
    return [
        ("quantile", lambda outputs, targets: critic.quantile(outputs, level)),
        ("cvar", lambda outputs, targets: critic.cvar(outputs, level)),
    ]


def check_nothing_to_save(case: CriticCase) -> None:
    """A critic has no state: what it computes follows from its settings, so constants stay out of checkpoints."""
    critic, outputs = case.make(), case.outputs(6)
    saved = sorted(critic.state_dict())
    assert not saved, f"{case}: `state_dict` must be empty, has {saved}. Register constants with persistent=False."
    same = torch.equal(copy.deepcopy(critic).value(outputs), critic.value(outputs))
    assert same, f"{case}: a copy must give the same value."


def check_readouts(case: CriticCase) -> None:
    """Quantile and cvar rise with the level and agree with the samples; a critic without a distribution refuses both.

    Both are [B] in float32. A level outside of (0, 1] is refused, and a level below 0.5 may be.
    """
    critic, outputs = case.make(), case.outputs(6)
    for what, read in (("quantile", critic.quantile), ("cvar", critic.cvar)):
        allowed = [level for level in LEVELS if not _refused(lambda level=level: read(outputs, level))]  # noqa: B023 (called at once)
        if not critic.is_distributional:
            assert not allowed, f"{case}: {what} must be a ValueError, as nothing is known of how returns scatter."
            continue
        taken = [level for level in NO_LEVELS if not _refused(lambda level=level: read(outputs, level))]  # noqa: B023
        assert not taken, f"{case}: {what} must refuse levels outside of (0, 1], takes {taken}."
        right = set(allowed) >= {level for level in LEVELS if level >= 0.5} and allowed == list(LEVELS[-len(allowed) :])
        assert right, f"{case}: {what} must take every level from some level on, 0.5 or less, takes {allowed}."
        found = torch.stack([read(outputs, level) for level in allowed], -1)
        form = found.shape == (6, len(allowed)) and found.dtype == torch.float32
        assert form, f"{case}: {what} must be float32 [6], is {found.dtype} {list(found.shape[:-1])}."
        assert (found.diff() >= -TIE).all(), f"{case}: {what} must not fall with the level, {allowed} give {found[0].tolist()}."
        _check_agrees(case, what, found, allowed)


def _check_agrees(case: CriticCase, what: str, found: Tensor, levels: list[float]) -> None:
    """Compare a readout at each level with what many samples say, up to the sample at which the level lies."""
    critic, outputs = case.make(), case.outputs(6)
    samples = critic.samples(outputs, FINE).sort(-1).values
    tie = ROUNDING * float(samples.max() - samples.min()) + TIE
    for level, column in zip(levels, found.unbind(-1), strict=True):
        count = round(level * FINE)
        if what == "cvar":
            least = most = samples[:, :count].mean(-1)
        else:
            least = samples[:, max(count - 2, 0)]
            most = samples[:, count] if count < FINE else torch.full_like(least, math.inf)
        off = float(torch.maximum(least - column, column - most).max())
        assert off <= tie, f"{case}: {what} at level {level} must be that of the samples, is off by {off:.3g}."
    if what == "cvar":
        assert _close(found[:, -1], critic.value(outputs)), f"{case}: cvar at level 1 must be the value."


CRITIC_CHECKS: tuple[Callable[[CriticCase], None], ...] = (
    check_shapes,
    check_refuses_other_rows,
    check_samples_have_the_value,
    check_loss_bounded,
    check_targets_equally_likely,
    check_rows_independent,
    check_clipping,
    check_gradient_to_outputs_alone,
    check_start,
    check_learns,
    check_low_precision,
    check_devices,
    check_nothing_to_save,
    check_readouts,
)
"""Every check of the suite; each takes a :class:`CriticCase` and raises AssertionError."""


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
