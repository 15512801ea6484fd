"""Members of a population as Trainables of Ray Tune, for those whose schedules and clusters are Tune's already."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.pbt.engines.hosting import Birth, Members, Succession
from morphogen.pbt.member import Factory
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.snapshots import SUFFIX, read_snapshot, write_snapshot
from morphogen.pbt.strategies import Strategy
from morphogen.state import RandomStreams

try:
    from ray.tune import Trainable
except ImportError as error:
    raise ImportError("Ray Tune is not installed. Run: pip install 'morphogen[ray]'") from error


@dataclasses.dataclass(frozen=True)
class Settings:
    """What :func:`trainable` was given; see there."""

    member_factory: Factory
    steps_per_iteration: int
    metric: str
    optimizer_exploit_strategy: Strategy
    seed: int


class MemberTrainable(Trainable):
    """A member as a Trainable; :func:`trainable` makes classes of this kind.

    What is in force after any sequence of ``setup``, ``reset_config`` and ``load_checkpoint`` are the hyperparameters of the
    config that came last, read back from what uses them. A checkpoint of the same trial is gone on from bit-identically; one
    of another trial is taken over as by :class:`~morphogen.pbt.PopulationTrainer`: moments by the strategy, chance derived
    from (source's seed, this trial, step), schedule and groups kept. An actor that Tune gives to another trial begins anew.

    Attributes:
        settings: Of the class.
    """

    settings: Settings

    def setup(self, config: dict[str, Any]) -> None:
        """Know how to begin."""
        self._members = Members(self.settings.member_factory, self.settings.metric)
        self._become(config)

    def step(self) -> dict[str, Any]:
        """Train for ``steps_per_iteration`` steps, and return score and metrics, and the steps of the lineage.

        Raises:
            MorphogenError: The member raised; the message holds what.
        """
        self._begin()
        until = self._num_steps + self.settings.steps_per_iteration
        outcome = self._members.train(self._number, until)
        if outcome.trained is None:
            raise MorphogenError(f"trial {self.trial_id}: {outcome.problem}")
        self._num_steps = until
        return {**outcome.trained.metrics, self.settings.metric: outcome.trained.score, "timesteps_total": until}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write all of the member into a file named after its content.

        Raises:
            CheckpointError: The disk refused.
        """
        self._begin()
        facts = {"trial": self._trial, "number": self._number, "seed": self._seed, "num_steps": self._num_steps}
        state = self._members.save(self._number)
        write_snapshot({**facts, "hyperparameters": dict(self._hyperparameters), "state": state}, checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a checkpoint of this trial, or take over another one's.

        Raises:
            CheckpointError: It is damaged, or not of a :class:`MemberTrainable`.
            MorphogenError: The member refuses it; the message holds why.
        """
        files = list(Path(checkpoint).glob("*" + SUFFIX))
        if len(files) != 1:
            raise CheckpointError(f"{checkpoint}: must hold one file *{SUFFIX}, has {len(files)}. Use another checkpoint.")
        saved = read_snapshot(str(checkpoint), files[0].stem)
        if saved["trial"] == self._trial:
            self._go_on(saved)
        else:
            self._take_over(saved)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Use another config; for another trial, begin anew. Returns True: it always can."""
        if self.trial_id != self._trial:
            self._members.end(self._number)
            self._become(new_config)
            return True
        self._hyperparameters = _plain(new_config)
        if self._has_begun:
            self._must(self._members.explore(self._number, self._hyperparameters))
        return True

    def cleanup(self) -> None:
        """Let go of the member."""
        self._members.close()

    def _become(self, config: Mapping[str, Any]) -> None:
        """Be the trial that Tune says this is; its member is made when it is needed."""
        self._trial: str = self.trial_id
        self._number = _number_of(self._trial)
        self._seed = RandomStreams(self.settings.seed).integer("member", self._number)
        self._num_steps = 0
        self._hyperparameters = _plain(config)
        self._has_begun = False

    def _begin(self, state: Any = None) -> None:
        if self._has_begun and state is None:
            return
        self._must(self._members.begin(Birth(self._number, self._hyperparameters, self._seed, state)))
        self._members.check(self.settings.optimizer_exploit_strategy)
        self._has_begun = True

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        self._seed, self._num_steps = saved["seed"], saved["num_steps"]
        self._begin(saved["state"])
        self._must(self._members.explore(self._number, self._hyperparameters))  # those saved were in force until now

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        self._begin()
        strategy, theirs = self.settings.optimizer_exploit_strategy, saved["number"]
        source = Members(self.settings.member_factory, self.settings.metric)
        self._must(source.begin(Birth(theirs, saved["hyperparameters"], saved["seed"], saved["state"])))
        values = source.read(theirs, strategy)
        source.close()
        if values is None:
            raise MorphogenError(f"trial {self._trial}: {saved['trial']} does not give its parameters; the log says why.")
        self._num_steps = saved["num_steps"]
        self._seed = RandomStreams(saved["seed"]).integer("successor", self._number, self._num_steps)
        order = Succession(self._number, self._hyperparameters, self._seed, strategy)
        self._must(self._members.take_over(order, values))

    def _must(self, problem: str) -> None:
        if problem:
            raise MorphogenError(f"trial {self._trial}: {problem}")


def trainable(
    member_factory: Factory,
    *,
    steps_per_iteration: int,
    metric: str = "score",
    optimizer_exploit_strategy: Strategy = "reset",
    seed: int = 0,
) -> type[MemberTrainable]:
    """Return a class of Trainables, to be given to ``ray.tune.Tuner``.

    Each trial is one member, made by ``member_factory(number of the trial, hyperparameters, seed)``. Its hyperparameters are
    Tune's config, all of it: fix what is not searched in the factory, by ``functools.partial``. Results hold the score under
    ``metric``, the member's metrics, and ``timesteps_total``, the steps of the lineage.

    Args:
        member_factory: Makes members.
        steps_per_iteration: How many steps of a member are one iteration of Tune, >= 1.
        metric: Name of the score, in results and where members return several numbers.
        optimizer_exploit_strategy: What becomes of moments when another trial is taken over; as in
            :class:`~morphogen.pbt.PBTConfig`.
        seed: Root of the members' chance, by number of the trial. Tune's own scheduler is not seeded.

    Raises:
        ValueError: ``steps_per_iteration`` is below 1.

    Example:
        >>> from morphogen.pbt import FunctionMember
        >>> def climb(hyperparameters, state, report):
        ...     height = state or 0.0
        ...     while True:
        ...         height += hyperparameters["step"]
        ...         report(height, state=height)
        >>> Climber = trainable(lambda number, hyperparameters, seed: FunctionMember(climb), steps_per_iteration=4)
        >>> climber = Climber({"step": 0.5})
        >>> climber.train()["score"]
        2.0
        >>> climber.stop()
    """
    if steps_per_iteration < 1:
        raise ValueError(f"`steps_per_iteration` must be at least 1, got {steps_per_iteration}. A trial must train.")
    settings = Settings(member_factory, steps_per_iteration, metric, optimizer_exploit_strategy, seed)
    return type("MemberTrainable", (MemberTrainable,), {"settings": settings})


def _plain(config: Mapping[str, Any]) -> Hyperparameters:
    """Return a config with Python's numbers for NumPy's, which what is drawn by Tune may be."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in config.items()}


def _number_of(trial: str) -> int:
    """Return the number at the end of a trial's id, a hash if there is none."""
    end = trial.rpartition("_")[2]
    return int(end) if end.isdecimal() else zlib.crc32(trial.encode())
