"""The conformance suite of distributions over actions: probabilities, draws and masks that agree with each other.

Call :func:`check_actions` for a distribution of your own, or let pytest show each check by itself::

    @pytest.mark.parametrize("check", ACTION_CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("case", action_cases(), ids=str)
    def test_actions(case, check):
        check(case)

Chance is drawn from generators with fixed seeds, so that a check always finds the same.

Shapes: B rows, A outputs of the policy's last layer, M mask width (0 or A), N environments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from morphogen.rl.actions import ActionDistribution
from morphogen.testing.action_cases import TIE, ActionCase, action_cases as action_cases, chance, close, refused
from morphogen.testing.hosts import chance_state

NUM_DRAWS = 20_000
NUM_ERRORS = 5.0
"""What is estimated from draws may be off by so many standard errors, and by ESTIMATE."""
ESTIMATE = 0.01
FEW = 2e-3
"""Probability that may be left to actions that did not come up."""
LEAST_LOG_PROB = -1e20
"""A log-probability below is that of an impossible action."""
LARGE = 30_000.0
"""Outputs of this size fit into float16."""
SLOPE_STEP = 1e-2


def check_actions(
    make_actions: Callable[[], ActionDistribution],
    space: Space[Any],
    *,
    density: Literal["stored", "env"] = "stored",
    name: str = "actions",
) -> None:
    """Run every check on a distribution.

    Args:
        make_actions: Returns a new distribution, equal each time.
        space: The action space of a single environment.
        density: See :class:`ActionCase`.
        name: Of messages.

    Raises:
        AssertionError: A check failed; the message says which, and what was expected and found.

    Example:
        >>> from gymnasium.spaces import Discrete
        >>> from morphogen.rl.actions import make
        >>> check_actions(lambda: make(Discrete(3)), Discrete(3))
    """
    for check in ACTION_CHECKS:
        check(ActionCase(name, space, make_actions, density))


def check_shapes(case: ActionCase) -> None:
    """Actions are stored as declared, results have one entry a row (and head) in float32, and nothing is written to."""
    actions = case.make()
    heads = actions.num_heads
    assert actions.mask_width in (0, actions.num_outputs), f"{case}: a mask must have an entry for each output, or none."
    for num_rows in (1, 7):
        for mask in case.masks(num_rows):
            outputs, noise = case.outputs(num_rows), actions.noise((num_rows,), chance())
            before = [outputs.clone(), noise.clone()]
            drawn, log_prob = actions.sample(outputs, noise, mask)
            result = actions.evaluate(outputs, drawn, mask)
            for what, found, shape, dtype in (
                ("drawn actions", drawn, (num_rows, *actions.action_shape), actions.action_dtype),
                ("modes", actions.mode(outputs, mask), (num_rows, *actions.action_shape), actions.action_dtype),
                ("log-probabilities", log_prob, (num_rows, heads), torch.float32),
                ("entropies", result.entropy_BH, (num_rows, heads), torch.float32),
                ("joint entropies", result.entropy_B, (num_rows,), torch.float32),
                ("kl", actions.kl(outputs, outputs, mask), (num_rows,), torch.float32),
            ):
                right = found.shape == shape and found.dtype == dtype
                assert right, f"{case}: {what} must be {dtype} {list(shape)}, are {found.dtype} {list(found.shape)}."
            relevant = result.relevant_BH
            right = relevant is None or (relevant.shape == (num_rows, heads) and relevant.dtype == torch.bool)
            assert right, f"{case}: `relevant_BH` must be None or bool [{num_rows}, {heads}]."
            kept = torch.equal(outputs, before[0]) and torch.equal(noise, before[1])
            assert kept, f"{case}: outputs and noise must not be written to."


def check_noise(case: ActionCase) -> None:
    """Noise has the shape asked for, comes from the given generator alone, and each row has its own."""
    actions = case.make()
    before = chance_state()
    noise, again, other = (actions.noise((3, 4), chance(seed)) for seed in (0, 0, 1))
    assert chance_state() == before, f"{case}: noise must come from the given generator, a global one moved."
    right = noise.shape[:2] == (3, 4) and noise.ndim == 3 and noise.dtype == torch.float32
    assert right, f"{case}: noise must be float32 [3, 4, width], is {noise.dtype} {list(noise.shape)}."
    assert torch.equal(noise, again), f"{case}: equal generators must give equal noise."
    assert not torch.equal(noise, other), f"{case}: noise must depend on the generator."
    assert len(noise.flatten(0, 1).unique(dim=0)) == 12, f"{case}: rows must have noise of their own, some have the same."


def check_rows_independent(case: ActionCase) -> None:
    """What a row draws and is told depends on its own outputs, noise and mask alone."""
    actions = case.make()
    outputs, old = ([case.outputs(6, seed), case.outputs(6, seed + 2)] for seed in (0, 1))
    noise = [actions.noise((6,), chance(seed)) for seed in (0, 1)]
    for mask, turned in ((None, None), (case.mask(6), case.mask(6, seed=1))):
        others = None if mask is None or turned is None else _other_rows([mask, turned])
        first = _results(actions, outputs[0], noise[0], old[0], mask)
        second = _results(actions, _other_rows(outputs), _other_rows(noise), _other_rows(old), others)
        for (what, found), (_, again) in zip(first, second, strict=True):
            assert close(found[0], again[0]), f"{case}: {what} of a row must not depend on other rows."


def _other_rows(pair: list[Tensor]) -> Tensor:
    """Return the first row of the first, and the other rows of the second."""
    return torch.cat((pair[0][:1], pair[1][1:]))


def _results(
    actions: ActionDistribution, outputs: Tensor, noise: Tensor, old: Tensor | None, mask: Tensor | None
) -> list[tuple[str, Tensor]]:
    """Return what a distribution says of ``outputs``, by name; without a kl where ``old`` is None."""
    with torch.no_grad():
        drawn = actions.draw(outputs, noise, mask)
        result = actions.evaluate(outputs, drawn, mask)
        named = [
            ("the drawn action", drawn),
            ("the mode", actions.mode(outputs, mask)),
            ("the log-probability", result.log_prob_BH),
            ("the entropy", result.entropy_BH),
        ]
        return named if old is None else [*named, ("the kl", actions.kl(old, outputs, mask))]


def check_sample(case: ActionCase) -> None:
    """A sample is what is drawn with its log-probabilities by evaluation, to the bit, and the same for the same noise."""
    actions, outputs = case.make(), case.outputs(64)
    noise = actions.noise((64,), chance())
    for mask in case.masks(64):
        drawn, log_prob = actions.sample(outputs, noise, mask)
        same = torch.equal(drawn, actions.draw(outputs, noise, mask))
        assert same, f"{case}: a sample must be what `draw` gives for the same noise."
        same = torch.equal(log_prob, actions.evaluate(outputs, drawn, mask).log_prob_BH)
        assert same, f"{case}: log-probabilities of a sample must be those of `evaluate`."


def check_probabilities(case: ActionCase) -> None:
    """Probabilities sum (densities integrate) to 1, and actions come up as often as they say."""
    for mask in case.masks(1):
        draws = _Draws(case, mask)
        if draws.actions.action_dtype.is_floating_point:
            _check_density(case, draws)
            continue
        unique, counts = draws.drawn.unique(dim=0, return_counts=True)
        chances = draws.log_prob(unique).exp()
        total = float(chances.sum())
        assert abs(total - 1) <= FEW, f"{case}: probabilities of all actions that come up must sum to 1, sum to {total:.5g}."
        error = NUM_ERRORS * (chances * (1 - chances).clamp_min(0) / NUM_DRAWS).sqrt() + 1 / NUM_DRAWS
        excess = (counts / NUM_DRAWS - chances).abs() - error
        worst = int(excess.argmax())
        assert excess[worst] <= 0, (
            f"{case}: {unique[worst].tolist()} must come up with its probability {float(chances[worst]):.4g}, does with "
            f"{int(counts[worst]) / NUM_DRAWS:.4g}."
        )


class _Draws:
    """Many actions drawn from the distribution of one row of outputs."""

    def __init__(self, case: ActionCase, mask: Tensor | None) -> None:
        self.actions = case.make()
        self.outputs, self.mask = case.outputs(1), mask
        noise = self.actions.noise((NUM_DRAWS,), chance())
        with torch.no_grad():
            self.drawn = self.actions.draw(*self.rows(NUM_DRAWS, noise))

    def rows(self, num: int, given: Tensor, outputs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the row of outputs ``num`` times, ``given``, and the mask as many times."""
        outputs = self.outputs if outputs is None else outputs
        return outputs.expand(num, -1), given, None if self.mask is None else self.mask.expand(num, -1)

    def log_prob(self, actions: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Return the log-probability of each of ``actions``, all heads together."""
        with torch.no_grad():
            return self.actions.evaluate(*self.rows(len(actions), actions, outputs)).log_prob_BH.sum(1)


def _check_density(case: ActionCase, draws: _Draws) -> None:
    """Importance sampling both ways: a wider Gaussian weighs the density, what was drawn weighs a narrower one."""
    drawn = draws.drawn.double()
    mean, deviation = drawn.mean(0), drawn.std(0)
    wide = torch.distributions.Normal(mean, 1.5 * deviation)
    points = mean + 1.5 * deviation * torch.randn(drawn.shape, generator=chance(1), dtype=torch.float64)
    narrow = torch.distributions.Normal(mean, 0.8 * deviation)
    for what, log_weights in (
        ("the density must integrate to 1", _log_density(case, draws, points) - wide.log_prob(points).sum(1)),
        ("actions must come up as the density says", narrow.log_prob(drawn).sum(1) - _log_density(case, draws, drawn)),
    ):
        _check_estimate(f"{case}: {what}, a mean weight", log_weights.exp(), 1.0)


def _log_density(case: ActionCase, draws: _Draws, stored: Tensor) -> Tensor:
    """Return the log of the density of stored actions; the slope from them to the environment's is measured."""
    log_prob = draws.log_prob(stored)
    if case.density == "stored":
        return log_prob
    low, high = (draws.actions.to_env(stored + step) for step in (-SLOPE_STEP, SLOPE_STEP))
    slope = (torch.from_numpy(high).double() - torch.from_numpy(low).double()).flatten(1) / (2 * SLOPE_STEP)
    return log_prob + slope.clamp_min(1e-12).log().sum(1)


def check_mode(case: ActionCase) -> None:
    """The mode is an action that may come up, the same each time; the first choice of a finite one is its most probable."""
    actions, outputs = case.make(), case.outputs(64)
    finite = not actions.action_dtype.is_floating_point
    for mask in case.masks(64):
        mode = actions.mode(outputs, mask)
        assert torch.equal(mode, actions.mode(outputs, mask)), f"{case}: the mode must be the same each time."
        best = actions.evaluate(outputs, mode, mask).log_prob_BH
        assert (best.sum(1) > LEAST_LOG_PROB).all(), f"{case}: the mode must be possible."
        for seed in range(20) if finite else ():
            rival = actions.sample(outputs, actions.noise((64,), chance(seed)), mask)[1]
            assert (rival[:, 0] <= best[:, 0] + TIE).all(), f"{case}: the first choice of the mode must be the most probable."


def check_entropy(case: ActionCase) -> None:
    """The entropy, on average over actions, is that of their log-probabilities."""
    for mask in case.masks(1):
        draws = _Draws(case, mask)
        with torch.no_grad():
            entropy = draws.actions.evaluate(*draws.rows(NUM_DRAWS, draws.drawn)).entropy_B
        surprise = -draws.log_prob(draws.drawn)
        _check_estimate(f"{case}: entropy + log-probability", entropy - surprise, 0.0)


def check_kl(case: ActionCase) -> None:
    """KL(old || new) is 0 for equal outputs, never negative, and the mean of log old - log new over draws from old.

    It stays so when parameters of the distribution have moved in between, given the snapshot that was made before.
    """
    actions, old, new = case.make(), case.outputs(256), case.outputs(256, 1)
    for mask in case.masks(256):
        same = float(actions.kl(old, old, mask).detach().abs().max())
        assert same <= TIE, f"{case}: kl of equal outputs must be 0, is {same:.3g}."
        least = float(actions.kl(old, new, mask).detach().min())
        assert least >= -TIE, f"{case}: kl must not be negative, is {least:.3g}."
    if actions.snapshot() is None:
        takes_none = refused(lambda: actions.kl(old, new, None, torch.zeros(1)))
        assert takes_none, f"{case}: `snapshot_old` must be refused with ValueError where `snapshot` gives None."
    other = case.outputs(1, 1)
    for mask, moves in itertools.product(case.masks(1), (False, True)):
        draws = _Draws(case, mask)
        snapshot, before = draws.actions.snapshot(), draws.log_prob(draws.drawn)
        if moves:
            _move_parameters(draws.actions)
        gain = before - draws.log_prob(draws.drawn, other)
        with torch.no_grad():
            kl = float(draws.actions.kl(draws.outputs, other, mask, snapshot))
        _check_estimate(f"{case}: log old - log new{' once parameters moved' if moves else ''}", gain, kl)


def _move_parameters(actions: ActionDistribution) -> None:
    generator = chance(3)
    with torch.no_grad():
        for parameter in actions.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def check_gradients(case: ActionCase) -> None:
    """Log-probability and kl have finite gradients to all outputs given, the old ones included."""
    actions = case.make()
    for mask, scale in itertools.product(case.masks(64), (1.0, 100.0)):
        old, new = ((scale * case.outputs(64, seed)).requires_grad_() for seed in (0, 1))
        drawn = actions.draw(new.detach(), actions.noise((64,), chance()), mask)
        result, kl = actions.evaluate(new, drawn, mask), actions.kl(old, new, mask)
        for what, value, outputs in (
            ("log-probability", result.log_prob_BH, new),
            ("kl", kl, new),
            ("kl", kl, old),
            ("log-probability and entropy", result.log_prob_BH + result.entropy_BH, new),
        ):
            (gradient,) = torch.autograd.grad(value.sum(), outputs, retain_graph=True)
            assert gradient.isfinite().all(), f"{case}: the gradient of {what} must be finite (outputs of scale {scale:g})."
            assert gradient.any(), f"{case}: {what} must have a gradient to the outputs."


def check_masks(case: ActionCase) -> None:
    """What is forbidden is never drawn, counts for nothing however large its output, and gets a gradient of exactly 0.

    A mask that leaves a single action leaves it with probability 1. Where no mask is taken, one is refused with ValueError.
    """
    actions, mask = case.make(), case.mask(256)
    noise = actions.noise((256,), chance())
    if mask is None:
        _check_refuses_masks(case, actions)
        return
    for dtype, scale in itertools.product((torch.float32, torch.float16, torch.bfloat16), (1.0, LARGE)):
        outputs, old = ((scale * case.outputs(256, seed)).clamp(-LARGE, LARGE).to(dtype) for seed in (0, 1))
        what = f"{dtype} outputs of scale {scale:g}"
        drawn, log_prob = actions.sample(outputs, noise, mask)
        assert (log_prob.sum(1) > LEAST_LOG_PROB).all(), f"{case}: what is forbidden must never be drawn ({what})."
        tempting = (rows.masked_fill(~mask, 2 * LARGE) for rows in (outputs, old))
        found, expected = (
            _results(actions, next(tempting), noise, next(tempting), mask),
            _results(actions, outputs, noise, old, mask),
        )
        for (name, value), (_, other) in zip(found, expected, strict=True):
            assert close(value, other), f"{case}: outputs of what is forbidden must not count for {name} ({what})."
        live = outputs.clone().requires_grad_()
        result = actions.evaluate(live, drawn, mask)
        total = result.log_prob_BH.sum() + 7 * result.entropy_BH.sum() + actions.kl(old, live, mask).sum()
        (gradient,) = torch.autograd.grad(total, live)
        assert gradient.isfinite().all(), f"{case}: gradients under a mask must be finite ({what})."
        assert not gradient[~mask].any(), f"{case}: gradients of what is forbidden must be exactly 0 ({what})."
    _check_single_action(case, actions)


def _check_single_action(case: ActionCase, actions: ActionDistribution) -> None:
    outputs, mask = case.outputs(32), case.mask(32, share=1.0)
    mode = actions.mode(outputs, mask)
    for seed in range(10):
        drawn = actions.draw(outputs, actions.noise((32,), chance(seed)), mask)
        assert torch.equal(drawn, mode), f"{case}: the only action allowed must be drawn each time."
    result = actions.evaluate(outputs, mode, mask)
    certain = max(float(result.log_prob_BH.detach().sum(1).abs().max()), float(result.entropy_B.detach().abs().max()))
    assert certain <= TIE, f"{case}: the only action allowed must have log-probability and entropy 0, is off by {certain:.3g}."


def _check_refuses_masks(case: ActionCase, actions: ActionDistribution) -> None:
    outputs, noise = case.outputs(2), actions.noise((2,), chance())
    mask = torch.ones(2, actions.num_outputs, dtype=torch.bool)
    drawn = actions.draw(outputs, noise)
    for what, call in (
        ("draw", lambda: actions.draw(outputs, noise, mask)),
        ("mode", lambda: actions.mode(outputs, mask)),
        ("evaluate", lambda: actions.evaluate(outputs, drawn, mask)),
        ("kl", lambda: actions.kl(outputs, outputs, mask)),
        ("flatten_mask", lambda: actions.flatten_mask(mask.numpy(), 2)),
        ("check_mask", lambda: actions.check_mask(mask.numpy())),
    ):
        assert refused(call), f"{case}: `{what}` must refuse a mask with ValueError, as none is taken."


def check_mask_forms(case: ActionCase) -> None:
    """A flat mask is taken as it is; another width, and rows in which nothing is allowed, are a ValueError that says where."""
    actions, mask = case.make(), case.mask(4)
    if mask is None:
        return
    flat = mask.numpy()
    read = actions.flatten_mask(flat, 4)
    assert read.dtype == np.bool_ and np.array_equal(read, flat), f"{case}: a flat mask must be taken as it is."
    assert refused(lambda: actions.flatten_mask(flat[:, 1:], 4)), f"{case}: a mask of another width must be a ValueError."
    assert refused(lambda: actions.flatten_mask(flat, 3)), f"{case}: a mask of other environments must be a ValueError."
    stuck = np.ones_like(flat)
    stuck[2] = False
    try:
        actions.check_mask(stuck)
    except ValueError as error:
        assert "2" in str(error), f"{case}: the error of a mask must name environment 2, where nothing is allowed: {error}"
    else:
        raise AssertionError(f"{case}: `check_mask` must refuse a row in which nothing is allowed.")


def check_to_env(case: ActionCase) -> None:
    """What the environment gets is in its space, in its dtype and shape, and shares no memory with what is stored."""
    actions = case.make()
    for mask, scale in itertools.product(case.masks(32), (1.0, 1000.0)):
        outputs = scale * case.outputs(32)
        with torch.no_grad():
            stored = [actions.draw(outputs, actions.noise((32,), chance()), mask), actions.mode(outputs, mask)]
        for what, values in zip(("a drawn action", "the mode"), stored, strict=True):
            before = values.clone()
            given = actions.to_env(values)
            right = given.shape == (32, *(case.space.shape or ())) and given.dtype == case.space.dtype
            assert right, (
                f"{case}: actions must be {case.space.dtype} [32, *{case.space.shape}], are {given.dtype} {given.shape}."
            )
            outside = [row for row in range(32) if not case.space.contains(given[row, ...])]
            assert not outside, f"{case}: {what} must be in {case.space}, {given[outside[0]]} is not."
            given[...] = 1
            assert torch.equal(values, before), f"{case}: `to_env` must return a new array."


def check_low_precision(case: ActionCase) -> None:
    """Outputs of half precision, and autocast, give what their values give in float32."""
    actions, noise = case.make(), case.make().noise((64,), chance())
    for mask, dtype in itertools.product(case.masks(64), (torch.float16, torch.bfloat16)):
        outputs, old = case.outputs(64).to(dtype), case.outputs(64, 1).to(dtype)
        exact = _results(actions, outputs.float(), noise, old.float(), mask)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = _results(actions, outputs.float(), noise, old.float(), mask)
        for where, results in (
            (f"of {dtype} outputs", _results(actions, outputs, noise, old, mask)),
            ("under autocast", under_autocast),
        ):
            for (what, found), (_, expected) in zip(results, exact, strict=True):
                same = found.dtype == expected.dtype and close(found, expected)
                assert same, f"{case}: {what} {where} must be computed in float32."


def check_state(case: ActionCase) -> None:
    """Saved are the parameters and nothing else, so that tables of indices do not tie a checkpoint to a layout."""
    actions, fresh = case.make(), case.make()
    saved, learned = set(actions.state_dict()), {name for name, _ in actions.named_parameters()}
    assert saved == learned, f"{case}: `state_dict` must have the parameters alone, has also {sorted(saved - learned)}."
    _move_parameters(actions)
    fresh.load_state_dict(actions.state_dict())
    outputs, noise, old = case.outputs(8), actions.noise((8,), chance()), case.outputs(8, 1)
    pairs = zip(_results(actions, outputs, noise, old, None), _results(fresh, outputs, noise, old, None), strict=True)
    for (what, found), (_, again) in pairs:
        assert torch.equal(found, again), f"{case}: {what} must be the same with the state loaded."


def check_devices(case: ActionCase) -> None:
    """Constants follow the distribution to another device, and results are on the device of the outputs.

    Without a GPU that is the meta device, which autocast does not know, so that the kl is left out there.
    """
    devices = ("meta", "cuda") if torch.cuda.is_available() else ("meta",)
    for device, mask in itertools.product(devices, case.masks(4)):
        actions, noise = case.make().to(device), case.make().noise((4,), chance()).to(device)
        outputs, old = case.outputs(4).to(device), case.outputs(4, 1).to(device)
        mask = None if mask is None else mask.to(device)
        try:
            results = _results(actions, outputs, noise, None if device == "meta" else old, mask)
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError(f"{case}: everything must run on {device}, does not: {error}. Register constants.") from error
        for what, found in results:
            assert found.device.type == device, f"{case}: {what} of outputs on {device} must be there, is on {found.device}."


ACTION_CHECKS: tuple[Callable[[ActionCase], None], ...] = (
    check_shapes,
    check_noise,
    check_rows_independent,
    check_sample,
    check_probabilities,
    check_mode,
    check_entropy,
    check_kl,
    check_gradients,
    check_masks,
    check_mask_forms,
    check_to_env,
    check_low_precision,
    check_state,
    check_devices,
)
"""Every check of the suite; each takes an :class:`ActionCase` and raises AssertionError."""


def _check_estimate(what: str, values: Tensor, expected: float) -> None:
    """Compare the mean of ``values``, drawn independently, with ``expected``."""
    mean, error = float(values.double().mean()), float(values.double().std()) / math.sqrt(len(values))
    near = abs(mean - expected) <= NUM_ERRORS * error + ESTIMATE
    assert near, f"{what} must be {expected:.4g} on average over draws, is {mean:.4g} with a standard error of {error:.2g}."
