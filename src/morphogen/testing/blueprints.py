"""The conformance suite of blueprints: what a seed must do at birth, in its first steps, and after export.

Call :func:`check_blueprint` for a blueprint of your own, or let pytest show each check by itself::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("case", blueprint_cases(), ids=str)
    def test_blueprint(case, check):
        check(case)
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from morphogen.growth import Sowing, Stage, blueprints
from morphogen.growth.layouts import Layout
from morphogen.growth.lifecycle import OPERATORS, Operator
from morphogen.growth.operators import Seed
from morphogen.state import draw_from
from morphogen.testing.hosts import HostCase, chance_state, lead_to, same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (1, 2, 5, 8)
STEP = 0.1
"""Learning rate of the first step, for gradients of length 1 at each sample's residual, averaged over samples."""
LARGEST_MOVE = 0.5
"""A first step that moves the feature by more than this share of its size is a cliff."""
SMALLEST_MOVE = 1e-6
LEARNING_STEPS = 3
LARGEST_SHOCK = 10.0
"""A residual this many times as large as a feature, of another kind than those the seed was trained on, is a cliff."""
TIE = 1e-9
"""Double-precision outputs of order 1 that differ by less are the same."""


@dataclasses.dataclass(frozen=True)
class BlueprintCase:
    """One blueprint under one operator in one layout.

    Attributes:
        blueprint: Name in the registry.
        operator: "add", "scale" or "gate".
        layout: One of the blueprint's layouts.
        width: Channels of the feature.
        options: Options of the blueprint.
    """

    blueprint: str
    operator: Operator
    layout: Layout
    width: int = 8
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        """Return ``blueprint-operator-layout-option=value``, as the id of a test."""
        return "-".join([self.blueprint, self.operator, self.layout, *(f"{k}={v}" for k, v in self.options.items())])

    def option(self, name: str) -> Any:
        """Return what the blueprint is built with for an option, its default unless told; None if it has no such option."""
        parameters = inspect.signature(blueprints.get(self.blueprint).module).parameters
        return self.options.get(name, parameters[name].default if name in parameters else None)

    def seed(self, dtype: torch.dtype = torch.float32, root: int = 0) -> Seed:
        """Return a newborn seed, equal for equal ``root``."""
        with draw_from(torch.Generator().manual_seed(root)):
            body = blueprints.get(self.blueprint).build(self.width, self.layout, **self.options)
            return Seed(body, self.operator, self.width, self.layout).to(dtype)

    def grown_seed(self, dtype: torch.dtype = torch.float32) -> Seed:
        """Return a seed whose every parameter is random, as after training."""
        seed = self.seed()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.normal_(std=0.3, generator=generator)
        return seed.to(dtype)

    def feature(self, size: int = 5, dtype: torch.dtype = torch.float32, num_samples: int = 6) -> Tensor:
        """Return a random feature of the layout, ``size`` long (and wide) where there is space or time."""
        return _noise(_shape(self.layout, num_samples, self.width, size), 2).to(dtype)

    def features(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield features of several sizes, in each memory format, with a name for messages."""
        for size in SIZES if self.layout != "NC" else SIZES[:1]:
            feature = self.feature(size, dtype)
            yield f"{dtype}, size {size}", feature
            if self.layout == "NCHW":
                yield f"{dtype}, size {size}, channels_last", feature.to(memory_format=torch.channels_last)


def blueprint_cases(names: Sequence[str] | None = None, width: int = 8) -> tuple[BlueprintCase, ...]:
    """Return blueprint x operator x layout, of the blueprints called ``names`` or of every one in the registry.

    Options that are a bool or a Literal get cases of their own with "add": each other value alone, and all bools together.
    """
    cases: list[BlueprintCase] = []
    for name in blueprints.names() if names is None else names:
        for layout in blueprints.get(name).layouts:
            cases += [BlueprintCase(name, operator, layout, width) for operator in OPERATORS]
            cases += [BlueprintCase(name, "add", layout, width, options) for options in _variants(name)]
    return tuple(cases)


def _variants(name: str) -> list[dict[str, Any]]:
    """Return options that differ from the defaults where an option's values can be listed."""
    options = blueprints.get(name).options
    init: Any = blueprints.get(name).module.__init__
    hints: dict[str, Any] = get_type_hints(init) if options else {}
    switched: dict[str, Any] = {}
    named: list[dict[str, Any]] = []
    for option in options:
        default = inspect.signature(init).parameters[option].default
        if isinstance(default, bool):
            switched[option] = not default
        elif get_origin(hints.get(option)) is Literal:
            named += [{option: value} for value in get_args(hints[option]) if value != default]
    single = [{option: value} for option, value in switched.items()]
    return single + ([switched] if len(switched) > 1 else []) + named


def check_blueprint(name: str, *, width: int = 8, options: Mapping[str, Any] | None = None) -> None:
    """Run every check on a registered blueprint, under every operator and in every layout it declares.

    Args:
        name: Name in the registry.
        width: Channels of the features.
        options: Options to build it with; by default none, and then each of the values in :func:`blueprint_cases`.

    Raises:
        AssertionError: A check failed; the message says which, and what was expected and found.
    """
    cases = blueprint_cases([name], width)
    if options is not None:
        cases = [dataclasses.replace(case, options=dict(options)) for case in cases if not case.options]
    for case, check in itertools.product(cases, CHECKS):
        check(case)


def check_identity_at_birth(case: BlueprintCase) -> None:
    """The residual of a newborn seed is zero in every dtype, size, memory format and mode."""
    for dtype, training in itertools.product(DTYPES, (True, False)):
        seed = case.seed(dtype).train(training)
        for what, feature in case.features(dtype):
            residual = seed(feature)
            _check_form(f"{case} ({what})", feature, residual)
            wrong = int(residual.count_nonzero())
            assert wrong == 0, f"{case}: s(h) must be 0 at birth, has {wrong} other values ({what}). Zero its last layer."
            assert torch.equal(feature + residual, feature), f"{case}: the output must be h at birth ({what})."


def check_feature_kept(case: BlueprintCase) -> None:
    """The residual has the shape and dtype of the feature, the output its memory format, and the feature is not written to."""
    for dtype in DTYPES:
        seed = case.grown_seed(dtype)
        for what, feature in case.features(dtype):
            before = feature.clone()
            residual = seed(feature)
            _check_form(f"{case} ({what})", feature, residual)
            assert torch.equal(feature, before), f"{case}: h must not be written to ({what}). Use no in-place layer on it."
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            feature = case.feature(dtype=dtype)
            _check_form(f"{case} ({dtype} under bfloat16 autocast)", feature, case.grown_seed()(feature))


def _check_form(what: str, feature: Tensor, residual: Tensor) -> None:
    assert residual.shape == feature.shape, f"{what}: s(h) must be of shape {feature.shape}, is {residual.shape}."
    assert residual.dtype == feature.dtype, f"{what}: s(h) must be {feature.dtype}, is {residual.dtype}."
    output = feature + residual
    for form in (torch.contiguous_format, torch.channels_last) if feature.ndim == 4 else ():
        if feature.is_contiguous(memory_format=form):
            assert output.is_contiguous(memory_format=form), f"{what}: the output must be {form} as h is."
    assert bool(output.isfinite().all()), f"{what}: s(h) must be finite."


def check_gradient_at_birth(case: BlueprintCase) -> None:
    """At birth some parameter has a non-zero gradient, and all gradients are finite."""
    for dtype in DTYPES:
        seed, feature = case.seed(dtype), case.feature(dtype=dtype)
        _loss(seed, feature).backward()
        gradients = {name: p.grad for name, p in seed.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            assert bool(gradient.isfinite().all()), f"{case}: the gradient of `{name}` must be finite at birth ({dtype})."
        alive = [name for name, gradient in gradients.items() if bool(gradient.any())]
        assert alive, (
            f"{case}: some gradient must be non-zero at birth ({dtype}), all are 0. "
            "Put nothing after the zero layer (a ReLU there is dead for ever), and zero one layer only."
        )


def check_channels_last(case: BlueprintCase) -> None:
    """Gradients in channels_last are those in contiguous format, also where the feature itself needs none."""
    if case.layout != "NCHW":
        return
    found: list[dict[str, Tensor | None]] = []
    for form in (torch.contiguous_format, torch.channels_last):
        seed, feature = case.grown_seed(), case.feature().contiguous(memory_format=form)
        for part in seed.modules():
            if isinstance(part, nn.GroupNorm):
                part.register_forward_pre_hook(_refuse_crash(case))
        _loss(seed, feature).backward()
        found.append({name: parameter.grad for name, parameter in seed.named_parameters()})
    for name, gradient in found[0].items():
        other = found[1][name]
        close = gradient is not None and other is not None and torch.allclose(gradient, other, rtol=1e-3, atol=1e-6)
        assert close, f"{case}: the gradient of `{name}` must be the same in channels_last."


def _refuse_crash(case: BlueprintCase) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def refuse(part: nn.Module, args: tuple[Tensor, ...]) -> None:
        plain = args[0].requires_grad or args[0].is_contiguous() or not any(p.requires_grad for p in part.parameters())
        assert plain, (
            f"{case}: GroupNorm on h itself must have affine=False. With weights, torch 2.13 on a CPU crashes in the backward "
            "pass of a channels_last feature that needs no gradient; the layer behind it can have the weights."
        )

    return refuse


def check_first_step(case: BlueprintCase) -> None:
    """One SGD step moves the output by a small, non-zero amount, in proportion to the step."""
    feature = case.feature()
    move, small_move = (_move(case, feature, step) for step in (STEP, STEP / 8))
    assert SMALLEST_MOVE < move < LARGEST_MOVE, (
        f"{case}: one step of SGD at {STEP} must move the output by a share in ({SMALLEST_MOVE}, {LARGEST_MOVE}), got "
        f"{move:.3g}. Put nothing after the zero layer: a normalisation there is a cliff."
    )
    assert 4.0 < move / small_move < 16.0, (
        f"{case}: a step 8 times as large must move the output about 8 times as far, got {move / small_move:.3g} times. "
        "Put the normalisation before the zero layer."
    )


def _move(case: BlueprintCase, feature: Tensor, step: float) -> float:
    seed = case.seed()
    optimizer = torch.optim.SGD(seed.parameters(), lr=step)
    _loss(seed, feature).backward()
    optimizer.step()
    with torch.no_grad():
        return float(seed(feature).norm() / feature.norm())


def check_every_parameter_learns(case: BlueprintCase) -> None:
    """Within a few steps of SGD every parameter, those of a gate included, has had a gradient and has moved."""
    seed, feature = case.seed(torch.float64), case.feature(dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in seed.named_parameters()}
    optimizer = torch.optim.SGD(seed.parameters(), lr=STEP)
    for _ in range(LEARNING_STEPS):
        optimizer.zero_grad()
        _loss(seed, feature).backward()
        optimizer.step()
    still = [name for name, parameter in seed.named_parameters() if torch.equal(before[name], parameter)]
    assert not still, f"{case}: every parameter must have moved after {LEARNING_STEPS} steps, {still} did not."


def check_constant_feature(case: BlueprintCase) -> None:
    """A feature that does not vary, and one that was zero, are no cliff: a few steps on them leave s(h) small for any h."""
    ordinary = case.feature()
    for value in (0.0, 1.0):
        seed, feature = case.seed(), torch.full_like(ordinary, value)
        optimizer = torch.optim.SGD(seed.parameters(), lr=STEP)
        for _ in range(LEARNING_STEPS):
            optimizer.zero_grad()
            _loss(seed, feature).backward()
            optimizer.step()
        with torch.no_grad():
            move = float(seed(ordinary).norm() / ordinary.norm())
        assert move < LARGEST_SHOCK, (
            f"{case}: after {LEARNING_STEPS} steps on a feature that is {value} everywhere, s(h) must be less than "
            f"{LARGEST_SHOCK} times an ordinary h, is {move:.3g} times. Divide by no scale that may be near zero."
        )


def check_samples_apart(case: BlueprintCase) -> None:
    """In eval mode a sample's residual does not depend on the other samples of the batch."""
    seed, feature = case.grown_seed(torch.float64).eval(), case.feature(dtype=torch.float64)
    other = torch.cat((feature[:1], 3.0 - 2.0 * feature[1:]))
    with torch.no_grad():
        worst = float((seed(feature)[0] - seed(other)[0]).abs().max())
    assert worst < TIE, (
        f"{case}: in eval mode other samples must not change s(h), one did by {worst:.3g}. Use no batch statistics."
    )


def check_causality(case: BlueprintCase) -> None:
    """With ``causal`` on, s at a position depends on no later one; with it off, it does.

    A blueprint for NLC without such an option sees no later position either: tokens go where nothing may look ahead, and who
    grows a language model must be able to tell from the options alone. In a signal (NCL) the operator "gate" pools positions.
    """
    causal = case.option("causal")
    if case.layout not in ("NCL", "NLC") or (case.layout == "NCL" and (causal is None or case.operator == "gate")):
        return
    worst = max(_leak(case, training) for training in (True, False))
    if causal is False:
        assert worst > TIE, f"{case}: with `causal` off s(h) must depend on later positions, does not. Or leave the option out."
    else:
        assert worst < TIE, (
            f"{case}: s(h) must not depend on later positions, does by {worst:.3g}. Pad on the left alone, normalise each "
            "position by itself, and give a blueprint that looks both ways the option `causal`, off."
        )


def _leak(case: BlueprintCase, training: bool) -> float:
    """Return how far s moves at most, at any position, when every later position is changed."""
    seed = case.grown_seed(torch.float64).train()
    feature = case.feature(8, torch.float64)
    axis = 1 if case.layout == "NLC" else 2
    moves: list[float] = []
    with torch.no_grad():
        seed(feature)  # first the statistics that some keep, then the rest
        seed.train(training)
        expected = copy.deepcopy(seed)(feature)
        for count in range(1, feature.shape[axis]):
            kept, later = feature.split([count, feature.shape[axis] - count], axis)
            found = copy.deepcopy(seed)(torch.cat((kept, 3.0 - 2.0 * later), axis))
            moves.append(float((found - expected).narrow(axis, 0, count).abs().max()))
    return max(moves)


def check_parameter_count(case: BlueprintCase) -> None:
    """``parameter_count`` says what is built, for several widths."""
    row = blueprints.get(case.blueprint)
    for width in (case.width, 2 * case.width, 3 * case.width, 5 * case.width):
        built = sum(p.numel() for p in dataclasses.replace(case, width=width).seed().body.parameters())
        said = row.parameter_count(width, case.layout, **case.options)
        assert said == built, f"{case}: `parameter_count` must be {built} at width {width}, got {said}."


def check_own_stream(case: BlueprintCase) -> None:
    """Equal generators build equal seeds, and building, running and training one draws from no global generator."""
    before = chance_state()
    seed, twin, feature = case.seed(), case.seed().state_dict(), case.feature()
    for name, tensor in seed.state_dict().items():
        same = same_bits(tensor, twin[name])
        assert same, f"{case}: `{name}` must be the same from the same generator. Draw from torch."
    _loss(seed.train(), feature).backward()
    assert chance_state() == before, f"{case}: no global generator may move. Leave dropout and other chance out of forward."


def check_incubation(case: BlueprintCase) -> None:
    """While the seed incubates, output, gradients and buffers of the host are those without a seed; the seed has gradients."""
    host = HostCase(case.layout, case.width)
    bare, model, example = host.build(), host.model(), host.example()
    model.germinate("early", _sowing(case))
    model.advance("early")
    for module in (bare, model):
        module(example).square().mean().backward()
    grads = {name: p.grad for name, p in bare.named_parameters()}
    for name, parameter in model.host.named_parameters():
        found, expected = parameter.grad, grads[name]
        same = found is not None and expected is not None and same_bits(found, expected)
        assert same, f"{case}: the gradient of the host's `{name}` must be what it is without the seed, to the bit."
    for (name, buffer), (_, twin) in zip(model.host.named_buffers(), bare.named_buffers(), strict=True):
        assert same_bits(buffer, twin), f"{case}: the host's buffer `{name}` must be what it is without the seed."
    owned = model.owners()["early"]
    assert any(p.grad is not None and bool(p.grad.any()) for _, p in owned), f"{case}: the incubating seed must get gradients."


def check_export(case: BlueprintCase) -> None:
    """Built into a plain module, the seed consists of torch's classes and computes exactly the same in eval mode."""
    host = HostCase(case.layout, case.width)
    model, example = host.model(), host.example()
    model.germinate("early", _sowing(case))
    seed = model.slot("early").seed
    assert seed is not None
    seed.load_state_dict(case.grown_seed().state_dict())
    for stage in (Stage.BLENDING, Stage.FOSSILIZED):
        lead_to(model.train(), "early", stage, example)
        try:
            plain = model.eval().export()
        except (TypeError, TraceError) as error:
            raise AssertionError(f"{case}: forward must be traceable by torch.fx, is not: {error}") from error
        own = {type(part).__module__ for part in plain.modules()} - {type(part).__module__ for part in model.host.modules()}
        foreign = sorted(name for name in own if name.partition(".")[0] != "torch")
        assert not foreign, f"{case}: the exported seed must consist of torch's classes, has some of {foreign}."
        with torch.no_grad():
            worst = float((plain(example) - model(example)).abs().max())
        assert worst == 0.0, f"{case}: exported in {stage.name}, outputs must be the same, differ by {worst:.3g}."


def _sowing(case: BlueprintCase) -> Sowing:
    return Sowing(blueprint=case.blueprint, operator=case.operator, options=case.options)


CHECKS: tuple[Callable[[BlueprintCase], None], ...] = (
    check_identity_at_birth,
    check_feature_kept,
    check_gradient_at_birth,
    check_channels_last,
    check_first_step,
    check_every_parameter_learns,
    check_constant_feature,
    check_samples_apart,
    check_causality,
    check_parameter_count,
    check_own_stream,
    check_incubation,
    check_export,
)
"""Every check of the suite; each takes a :class:`BlueprintCase` and raises AssertionError."""


def _loss(seed: Seed, feature: Tensor) -> Tensor:
    """Return a loss whose gradient is random and of length 1 at the residual of each sample, averaged over samples."""
    residual = seed(feature)
    direction = _noise(feature.shape, 3).to(feature.dtype)
    lengths = direction.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in feature.shape[1:]))
    return (residual * direction / lengths).sum() / len(feature)


def _shape(layout: Layout, num_samples: int, width: int, size: int) -> tuple[int, ...]:
    shapes: dict[Layout, tuple[int, ...]] = {
        "NC": (num_samples, width),
        "NCL": (num_samples, width, size),
        "NLC": (num_samples, size, width),
        "NCHW": (num_samples, width, size, size),
    }
    return shapes[layout]


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
