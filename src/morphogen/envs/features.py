"""The features of an observation: one row each, in groups that are known or unknown together. Pure.

Legend: N environments, S places for slots, P parts of a feature. ``read`` gives [N] or [N, P] for a run, [N, S] or [N, S, P]
for slots; NaN is "unknown", and makes the whole group unknown there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from morphogen.control import Op
from morphogen.envs.choices import Layout
from morphogen.envs.frames import NUM_LAGS, FloatArray, Frames
from morphogen.envs.rewards import Ledger
from morphogen.growth import Stage
from morphogen.growth.gates import Check
from morphogen.growth.lifecycle import ACTING, OPERATORS
from morphogen.growth.ramps import CURVES


@dataclasses.dataclass(frozen=True)
class View:
    """What features are read from.

    Attributes:
        frames: What is known of each run.
        ledger: What the reward remembers of it.
        layout: The places.
    """

    frames: Frames
    ledger: Ledger
    layout: Layout

    def run(self, name: str) -> FloatArray:
        """Return a number of every run, [N]."""
        return self.frames.run(name)

    def slot(self, name: str) -> FloatArray:
        """Return a number of every slot, [N, S]."""
        return self.frames.slot(name)

    def each(self, name: str) -> FloatArray:
        """Return a number of every run, [N, 1], to go with those of its slots."""
        return self.frames.run(name)[:, None]


def _one(layout: Layout) -> tuple[str, ...]:
    return ("",)


def _blueprints(layout: Layout) -> tuple[str, ...]:
    return tuple(str(place) for place in range(layout.num_blueprints))


def _each_of(names: Sequence[str]) -> Callable[[Layout], tuple[str, ...]]:
    return lambda layout: tuple(name.lower() for name in names)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One row of the table.

    Attributes:
        name: Its name.
        meaning: What it says.
        read: Its values; clipped to the range afterwards.
        low: Least value, -1 or 0.
        parts: Layout -> names of its numbers; a single unnamed one by default.
    """

    name: str
    meaning: str
    read: Callable[[View], FloatArray]
    low: float = -1.0
    parts: Callable[[Layout], tuple[str, ...]] = _one


@dataclasses.dataclass(frozen=True)
class Group:
    """Features that are known or unknown together.

    Attributes:
        flag: Name of the feature that is 1 where all of them are known; where it is 0, they are 0.
        meaning: What the flag says.
        features: The others.
    """

    flag: str
    meaning: str
    features: tuple[Feature, ...]


# -- scales -----------------------------------------------------------------------------------------------------------


def fine(difference: FloatArray) -> FloatArray:
    """asinh(100 * difference) / asinh(100): 0.01 of the metric gives 0.17, 0.1 gives 0.57, 1 gives 1; odd."""
    return np.arcsinh(100.0 * difference) / math.asinh(100.0)


def saturating(count: FloatArray, half: float) -> FloatArray:
    """Count / (count + half) for count >= 0, in [0, 1]; 0.5 at ``half``. NaN below 0."""
    return np.where(count < 0, np.nan, np.where(np.isposinf(count), 1.0, count / (count + half)))


def _one_hot(place: FloatArray, num_places: int) -> FloatArray:
    """Return [..., num_places]; NaN where the place is none of them."""
    found = (place[..., None] == np.arange(num_places)).astype(float)
    return np.where(found.any(-1, keepdims=True), found, np.nan)


def _bits(total: FloatArray, num_bits: int) -> FloatArray:
    """Return [..., num_bits] of a sum of powers of 2; NaN for what is none."""
    total = np.where((total >= 0) & (total < 2.0**num_bits), total, np.nan)
    return np.floor(total[..., None] / 2.0 ** np.arange(num_bits)) % 2.0


def _known_flag(value: FloatArray) -> FloatArray:
    """Return ``value`` where it is 0 or 1, else NaN."""
    return np.where((value == 0.0) | (value == 1.0), value, np.nan)


# -- of a run ---------------------------------------------------------------------------------------------------------


def _level(metric: FloatArray) -> FloatArray:
    return np.where(metric < 0, metric / (1.0 - metric), metric)


def _shortfall(view: View) -> FloatArray:
    return np.log(np.maximum(1.0 - view.run("metric"), 0.0) + 0.01) / math.log(100.0)


def _ratio(view: View, parameters: FloatArray) -> FloatArray:
    return np.log(parameters / view.run("host_parameters")) / 5.0


def _acting(view: View) -> FloatArray:
    """Return the parameters of acting seeds, each times its alpha, [N]."""
    weighed_NS = np.where(view.frames.in_stage(tuple(ACTING)), view.slot("alpha") * view.slot("parameters"), 0.0)
    return weighed_NS.sum(1)


def _gain(lag: int) -> Callable[[View], FloatArray]:
    before = "metric" if lag == 1 else f"metric_{lag - 1}"
    return lambda view: fine(view.run(before) - view.run(f"metric_{lag}"))


_RUN = Group(
    "run_known",
    "whether the run is there",
    (
        Feature("progress", "tick / ticks of the episode", lambda v: v.run("tick") / v.run("total_ticks"), 0.0),
        Feature("left", "n / (n + 10), n ticks left", lambda v: saturating(v.run("total_ticks") - v.run("tick"), 10.0), 0.0),
        Feature("host_size", "log10(parameters of the host) / 9", lambda v: np.log10(v.run("host_parameters")) / 9.0, 0.0),
        Feature("size", "ln(parameters / host's) / 5", lambda v: _ratio(v, v.run("parameters")), 0.0),
        Feature(
            "acting_size",
            "ln(1 + alpha * parameters / host's, summed over acting seeds) / 5",
            lambda v: _ratio(v, v.run("host_parameters") + _acting(v)),
            0.0,
        ),
        Feature(
            "compute",
            "ln(1 + training FLOPs so far / those of the host alone) / 4",
            lambda v: np.log1p(v.run("relative_flops")) / 4.0,
            0.0,
        ),
        Feature(
            "skipped",
            "n / (n + 1), n steps the governor stopped in the last tick",
            lambda v: saturating(v.run("skipped"), 1.0),
            0.0,
        ),
        Feature("quarantined", "n / (n + 1), n seeds it took out", lambda v: saturating(v.run("quarantined"), 1.0), 0.0),
        Feature(
            "rolled_back",
            "whether it rewound the run, which ends the episode",
            lambda v: _known_flag(v.run("rolled_back")),
            0.0,
        ),
        Feature(
            "last_op",
            "what was done before the last tick",
            lambda v: _one_hot(v.run("last_op"), len(Op)),
            0.0,
            _each_of([op.name for op in Op]),
        ),
        Feature(
            "advance",
            "asinh(10 * points that `loss_gain` has paid ahead) / 8",
            lambda v: np.arcsinh(10.0 * v.ledger.advance_N) / 8.0,
        ),
    ),
)
_LOSS = Group(
    "loss_known",
    "whether there was a training step, and a finite loss",
    (Feature("loss", "asinh(10 * mean training loss of the last tick) / 8", lambda v: np.arcsinh(10.0 * v.run("loss")) / 8.0),),
)
_METRIC = Group(
    "metric_known",
    "whether the metric is a number",
    (
        Feature("metric", "on the decision split; m / (1 - m) below 0", lambda v: _level(v.run("metric"))),
        Feature("shortfall", "ln(1.01 - metric) / ln(100)", _shortfall),
        Feature("metric_error", "fine(standard error of the metric)", lambda v: fine(v.run("metric_error")), 0.0),
        Feature(
            "gained",
            "metric - metric before training; d / (1 - d) below 0",
            lambda v: _level(v.run("metric") - v.run("start_metric")),
        ),
        Feature("below_best", "fine(best so far - metric)", lambda v: fine(v.run("best_metric") - v.run("metric")), 0.0),
        Feature(
            "all_seeds",
            "fine(metric - metric with every acting seed off)",
            lambda v: fine(v.run("metric") - v.run("all_off_metric")),
        ),
    ),
)
_GAINS = tuple(
    Group(
        f"gain_{lag}_known",
        f"whether the episode is {lag} {'tick' if lag == 1 else 'ticks'} old",
        (Feature(f"gain_{lag}", f"fine(what the metric gained, {lag - 1} to {lag} ticks ago)", _gain(lag)),),
    )
    for lag in range(1, NUM_LAGS + 1)
)
RUN_GROUPS = (_RUN, _LOSS, _METRIC, *_GAINS)

# -- of a slot --------------------------------------------------------------------------------------------------------


def _rent(view: View) -> FloatArray:
    return np.log1p(view.slot("parameters") / view.each("host_parameters")) / 5.0


def _acted_on(view: View) -> FloatArray:
    places = np.arange(view.layout.num_slots)
    return (view.each("last_slot") == places[None]).astype(float)


def _freshness(view: View) -> FloatArray:
    age_NS = view.each("tick") - view.slot("contribution_tick")
    return np.where(age_NS >= 0, 1.0 / (1.0 + age_NS), np.nan)


_SLOT = Group(
    "exists",
    "whether the task has such a slot",
    (
        Feature(
            "stage",
            "of its life",
            lambda v: _one_hot(v.slot("stage"), len(Stage)),
            0.0,
            _each_of([stage.name for stage in Stage]),
        ),
        Feature("ticks_in_stage", "n / (n + 5)", lambda v: saturating(v.slot("ticks_in_stage"), 5.0), 0.0),
        Feature("age", "n / (n + 10), n ticks since germination", lambda v: saturating(v.slot("age_ticks"), 10.0), 0.0),
        Feature("alpha", "weight of the seed", lambda v: v.slot("alpha"), 0.0),
        Feature("alpha_target", "where its ramp leads; 0 without a seed", lambda v: v.slot("alpha_target"), 0.0),
        Feature("ramp_left", "ticks left / 8; 0 at rest", lambda v: v.slot("ramp_ticks_left") / 8.0, 0.0),
        Feature("pruning", "whether the ramp leads to removal", lambda v: _known_flag(v.slot("is_pruning")), 0.0),
        Feature("gate_open", "whether ADVANCE or FOSSILIZE would pass", lambda v: _known_flag(v.slot("gate_open")), 0.0),
        Feature(
            "lacks",
            "what the gate asks for and is not there",
            lambda v: _bits(v.slot("refusals"), len(Check)),
            0.0,
            _each_of([check.name for check in Check]),
        ),
        Feature("rent", "ln(1 + parameters of the seed / host's) / 5", _rent, 0.0),
        Feature("germinations", "n / (n + 2), n seeds so far", lambda v: saturating(v.slot("germinations"), 2.0), 0.0),
        Feature(
            "tried",
            "blueprints pruned here before",
            lambda v: _bits(v.slot("tried"), v.layout.num_blueprints),
            0.0,
            _blueprints,
        ),
        Feature("acted_on", "whether the last action was here", _acted_on, 0.0),
        Feature("credit", "fine(credit that `escrow` has paid for the seed)", lambda v: fine(v.ledger.credit_NS), 0.0),
        Feature("pool", "fine(what `drip` has left to pay)", lambda v: fine(v.ledger.pool_NS), 0.0),
        Feature("rate", "fine(what it pays in a tick at most)", lambda v: fine(v.ledger.rate_NS), 0.0),
        Feature("basis", "fine(contribution at which it pays that)", lambda v: fine(v.ledger.basis_NS), 0.0),
    ),
)
_SEED = Group(
    "seed_known",
    "whether there is a seed",
    (
        Feature("blueprint", "of the seed", lambda v: _one_hot(v.slot("blueprint"), v.layout.num_blueprints), 0.0, _blueprints),
        Feature("operator", "how it acts", lambda v: _one_hot(v.slot("operator"), len(OPERATORS)), 0.0, _each_of(OPERATORS)),
        Feature("tempo", "length of its first ramp in ticks / 8", lambda v: v.slot("blend_ticks") / 8.0, 0.0),
        Feature(
            "curve",
            "shape of its first ramp and of its fading",
            lambda v: _one_hot(v.slot("curve"), len(CURVES)),
            0.0,
            _each_of(CURVES),
        ),
    ),
)
_CONTRIBUTION = Group(
    "contribution_known",
    "whether the contribution of this seed was ever measured",
    (
        Feature("contribution", "fine(metric - metric with the seed off)", lambda v: fine(v.slot("contribution"))),
        Feature("contribution_error", "fine(its standard error)", lambda v: fine(v.slot("contribution_error")), 0.0),
        Feature("freshness", "1 / (1 + ticks since it was measured)", _freshness, 0.0),
        Feature("peak", "fine(the highest so far)", lambda v: fine(v.slot("contribution_peak"))),
    ),
)
_GRADIENT = Group(
    "gradient_known",
    "whether the gradient was measured at this tick",
    (Feature("gradient", "log10(gradient per element / host's) / 3", lambda v: np.log10(v.slot("gradient_ratio")) / 3.0),),
)
_FINITE = Group(
    "finite_known",
    "whether weights and gradients were looked at, at this tick",
    (Feature("finite", "whether they were finite", lambda v: _known_flag(v.slot("finite")), 0.0),),
)
_BIRTH = Group(
    "birth_known",
    "whether the metric at the seed's germination is known",
    (
        Feature(
            "since_birth",
            "fine(metric - metric when it was germinated)",
            lambda v: fine(v.each("metric") - v.slot("metric_at_birth")),
        ),
    ),
)
SLOT_GROUPS = (_SLOT, _SEED, _CONTRIBUTION, _GRADIENT, _FINITE, _BIRTH)
