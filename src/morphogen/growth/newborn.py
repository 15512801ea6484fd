"""The newborn policy: how the parameters of a seed are optimised from its birth on.

torch's schedulers know groups by position and the run by its step: a group that joins late starts in the middle of the
host's schedule. Here the rate of a newborn is a closed form of its *age*, set after each step of the schedule:

    inherit    host's present rate * scale * warm_up(age)
    restart    peak rate * scale * schedule(age / steps left at birth) * warm_up(age)
    boost      the same times boost

The factor in front stands in the seed's own group (as ``initial_lr``), so that whoever lowers the rates of the run for
good, as the governor does after a rewind, lowers it too, and the closed form goes on from there.

Source: Yuan et al., "Accelerated Training via Incrementally Growing Neural Networks using Variance Transfer and Learning
Rate Adaptation", arXiv 2306.12700 (rates for each stage of growth); Loshchilov and Hutter, "SGDR", arXiv 1608.03983
(restarts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch.optim import Optimizer

from morphogen.config import Config
from morphogen.growth.model import HOST, GrowableModel
from morphogen.state import surgery, surgery_newborns

Schedule = Callable[[float], float]
"""Share of the way from the start of a run to its end, in [0, 1] -> share of the peak rate."""

_BOOST = 2.0


class NewbornConfig(Config):
    """How the parameters of a newborn seed are optimised. A setting that would have no effect is a ``ValueError``.

    Attributes:
        learning_rate: "inherit": the host's present rate, all along. "restart": the run's schedule anew, from the peak rate
            at birth to the end of the run. "boost": the same, ``boost`` times as high.
        boost: Factor on the restarted schedule; for "boost" alone.
        warmup_steps: Steps of the seed over which its rate rises linearly to the curve: ``(age + 1) / warmup_steps`` of it at
            ``age`` steps since birth. 0 for none. The host's rate does not change.
        learning_rate_scale: Factor on any of the curves, kept along the schedule.
        weight_decay: Weight decay of seeds; None for the host's.
        moments: What the seed's own moments start from. "fresh": nothing, step 0. "kept_step": zeros with the host's step
            count, so that their bias goes uncorrected and the first steps are up to 3.16 times as long (Adam's defaults);
            this is what padding the moments of a grown tensor does.
        host_moments: What becomes of the host's moments at each germination. "carry": they go on. "reset": moments and step
            count are forgotten. Those of other seeds go on.
    """

    learning_rate: Literal["inherit", "restart", "boost"] = "inherit"
    boost: float = Field(default=_BOOST, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    learning_rate_scale: float = Field(default=1.0, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    moments: Literal["fresh", "kept_step"] = "fresh"
    host_moments: Literal["carry", "reset"] = "carry"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.boost != _BOOST and self.learning_rate != "boost":
            raise ValueError(
                f'`boost` must be left out with `learning_rate` "{self.learning_rate}", got {self.boost}. '
                'Choose "boost", or use `learning_rate_scale`.'
            )
        return self


def warm_up(age_steps: int, warmup_steps: int) -> float:
    """Return ``min(1, (age_steps + 1) / warmup_steps)``: in (0, 1], 1 from the start where there is no warm-up.

    Example:
        >>> [warm_up(age, 4) for age in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, (age_steps + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(progress: float) -> float:
    """Return ``(1 + cos(pi * progress)) / 2``: from 1 at the start of a run, ``progress`` 0, to 0 at its end, 1."""
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def rate_factor(config: NewbornConfig, age_steps: int, steps_left_at_birth: int, schedule: Schedule = cosine) -> float:
    """Return the rate of a seed over the rate its curve is measured by: the host's present one, or the seed's own peak.

    With "inherit" it is ``learning_rate_scale * warm_up(age_steps)``. The others have scale and boost in the seed's peak
    (:func:`peak_factor`), so it is ``schedule(age_steps / steps_left_at_birth) * warm_up(age_steps)``.

    Args:
        config: The knobs.
        age_steps: Optimizer steps since birth.
        steps_left_at_birth: Steps from birth to the end of the run; from then on the schedule stands at its end.
        schedule: The run's.

    Example:
        >>> [round(rate_factor(NewbornConfig(learning_rate="restart"), age, 100), 3) for age in (0, 50, 100, 200)]
        [1.0, 0.5, 0.0, 0.0]
    """
    warm = warm_up(age_steps, config.warmup_steps)
    if config.learning_rate == "inherit":
        return config.learning_rate_scale * warm
    return schedule(min(1.0, age_steps / max(1, steps_left_at_birth))) * warm


def peak_factor(config: NewbornConfig) -> float:
    """Return the peak of a seed's restarted schedule over the run's peak: the scale, and for "boost" the boost."""
    return config.learning_rate_scale * (config.boost if config.learning_rate == "boost" else 1.0)


class NewbornPolicy:
    """Optimises newborn seeds as a :class:`NewbornConfig` says, in any loop; a part of the run.

    Make it after the scheduler and before the ``TrainingState``, and give it to that twice: its :meth:`options` make the
    groups of newborns, and as an extra its births are saved, rewound and resumed with everything else. Call :meth:`step`
    after each step of the scheduler.

    A seed keeps its curve as long as it lives, also after it was fossilised; that ends with its removal, and another seed in
    the same slot starts anew. Seeds that are there when the policy is made go by the host's schedule. ``adopt`` takes over
    births and the count of steps from the other run, as it does every extra; peak rates stay the run's own.

    Args:
        config: The knobs.
        model: Whose owners are watched; all but the host are seeds. The run's only model.
        optimizer: The one that steps them. Births change its moments as configured, :meth:`step` the seeds' rates.
        total_steps: Optimizer steps of the run; where a restarted schedule ends.
        peak_learning_rate: Where a restarted schedule starts; by default the host's initial rate (OneCycleLR: its maximum).
        schedule: The run's, as a function of the share of the way; by default the cosine to zero.

    Raises:
        ValueError: A setting would have no effect, here or with this optimizer, or is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from morphogen.growth import GrowableModel
        >>> from morphogen.state import TrainingState
        >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = GrowableModel(host, points={"early": "1"}, example_input=torch.zeros(2, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        >>> newborn = NewbornPolicy(NewbornConfig(learning_rate="restart", warmup_steps=10), model, optimizer, 100)
        >>> state = TrainingState(
        ...     model, optimizer, scheduler, extras={"newborn": newborn}, newborn_options=newborn.options
        ... )
        >>> for step in range(60):
        ...     if step == 50:
        ...         _ = model.germinate("early", blueprint="mlp")
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        ...     newborn.step()
        >>> {owner: round(rate, 4) for owner, rate in state.learning_rates().items()}
        {'host': 0.0035, 'early': 0.009}
    """

    def __init__(
        self,
        config: NewbornConfig,
        model: GrowableModel,
        optimizer: Optimizer,
        total_steps: int,
        *,
        peak_learning_rate: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Check the settings against the optimizer and watch the model."""
        _check_run(config, optimizer, total_steps, peak_learning_rate, schedule)
        self.config = config
        self._model, self._optimizer, self._total_steps = model, optimizer, total_steps
        self._schedule = schedule or cosine
        self._peak_ratio = 1.0
        if config.learning_rate != "inherit":
            surgery_newborns.note_initial_rates(optimizer)
            if peak_learning_rate is not None:
                self._peak_ratio = peak_learning_rate / float(surgery_newborns.peak_rate(optimizer, HOST))
        self._steps = 0
        self._births: dict[str, int | None] = dict.fromkeys(_seeds(model))
        self._claimed = set(self._births)
        model.on_topology_change(self._follow)

    @property
    def ages_steps(self) -> dict[str, int]:
        """Slot -> optimizer steps since the birth of its seed, of the seeds that this policy saw born."""
        return {owner: self._steps - birth for owner, birth in self._births.items() if birth is not None}

    def options(self, owner: str) -> dict[str, Any]:
        """Return the optimizer options of the group to be made for ``owner``, at its present age; none if it is no seed."""
        if owner not in _seeds(self._model):
            return {}
        self._claimed.add(owner)
        decay = self.config.weight_decay
        options: dict[str, Any] = {} if decay is None else {"weight_decay": decay}
        factor = self._factor(self._births.get(owner, self._steps))
        if factor is None:
            return options
        if self.config.learning_rate == "inherit":
            return {"lr": surgery_newborns.present_rate(self._optimizer, HOST) * factor, **options}
        peak = surgery_newborns.peak_rate(self._optimizer, HOST) * (self._peak_ratio * peak_factor(self.config))
        return {"lr": peak * factor, "initial_lr": peak, **options}

    def step(self) -> None:
        """Count a step and set the rate of every seed for the next one; call it after the scheduler's step.

        Raises:
            ValueError: A seed was born that :meth:`options` was not asked for: the ``TrainingState`` does not know this policy.
        """
        self.count()
        for owner, birth in self._births.items():
            factor = self._factor(birth)
            if factor is None:
                continue
            if self.config.learning_rate == "inherit":
                surgery_newborns.follow_rate(self._optimizer, owner, HOST, factor)
            else:
                surgery_newborns.follow_initial_rate(self._optimizer, owner, factor)

    def count(self) -> None:
        """Count a step and leave the rates, where every group has the host's anyway.

        Raises:
            ValueError: As :meth:`step`.
        """
        if not self._births.keys() <= self._claimed:
            strangers = self._births.keys() - self._claimed
            raise ValueError(
                "`newborn_options` of the TrainingState must be this policy's `options`, and the policy be among its `extras`, "
                f"got seeds in {', '.join(sorted(strangers))} that came without. Pass both."
            )
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps, and slot -> step of birth (None for a seed that was there before the policy)."""
        return {"steps": self._steps, "births": dict(self._births)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; the rates themselves come back with the optimizer's groups."""
        self._steps = state["steps"]
        self._births = dict(state["births"])
        self._claimed = set(self._births)

    def _factor(self, birth: int | None) -> float | None:
        """Return :func:`rate_factor` of a seed at its present age; None if it goes by the host's schedule."""
        if birth is None:
            return None
        return rate_factor(self.config, self._steps - birth, self._total_steps - birth, self._schedule)

    def _follow(self) -> Callable[[], None]:
        """Note births and deaths, and start moments as configured; return what takes that back."""
        seeds = _seeds(self._model)
        births, claimed, put_back = self._births, self._claimed, surgery.remember(self._optimizer)
        born = [owner for owner in seeds if owner not in births]
        self._births = {owner: births.get(owner, self._steps) for owner in seeds}
        self._claimed = claimed & seeds.keys()
        if born:
            self._start_moments(born)

        def take_back() -> None:
            self._births, self._claimed = births, claimed
            put_back()

        return take_back

    def _start_moments(self, born: list[str]) -> None:
        owners = self._model.owners()
        host = [parameter for _, parameter in owners[HOST]]
        if self.config.moments == "kept_step":
            newborns = [parameter for owner in born for _, parameter in owners[owner]]
            surgery_newborns.start_at_step_of(self._optimizer, newborns, host)
        if self.config.host_moments == "reset":
            surgery.reset_moments(self._optimizer, host)


def _seeds(model: GrowableModel) -> Mapping[str, object]:
    return {owner: owned for owner, owned in model.owners().items() if owner != HOST}


def _check_run(
    config: NewbornConfig, optimizer: Optimizer, total_steps: int, peak_learning_rate: float | None, schedule: Schedule | None
) -> None:
    kind = type(optimizer).__name__
    if total_steps < 1:
        raise ValueError(f"`total_steps` must be >= 1, got {total_steps}. Pass the optimizer steps of the whole run.")
    if peak_learning_rate is not None and not 0.0 < peak_learning_rate < math.inf:
        raise ValueError(f"`peak_learning_rate` must be positive and finite, got {peak_learning_rate}. Leave it out.")
    for name, value in (("peak_learning_rate", peak_learning_rate), ("schedule", schedule)):
        if value is not None and config.learning_rate == "inherit":
            raise ValueError(f'`{name}` must be left out with `learning_rate` "inherit", got {value}. Choose "restart".')
    if config.moments == "kept_step" and not surgery_newborns.corrects_bias_by_step(optimizer):
        raise ValueError(
            f'`moments` must be "fresh" with {kind}, got "kept_step": its steps do not depend on a step count alone. '
            "Use Adam, AdamW, Adamax or RAdam."
        )
    if config.host_moments == "reset" and not surgery_newborns.has_moments(optimizer):
        raise ValueError(f'`host_moments` must be "carry" with {kind} without momentum, got "reset". It has no moments.')
    if config.weight_decay is not None and "weight_decay" not in optimizer.defaults:
        raise ValueError(f"`weight_decay` must be left out with {kind}, got {config.weight_decay}. It has no such option.")
