"""The members of one process: each with chance of its own, none of which may fail another. What every engine is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import torch

from morphogen.errors import MorphogenError
from morphogen.pbt.member import (
    Factory,
    Member,
    Trained,
    bind,
    check_strategy,
    make_whole,
    take_over,
    trained_of,
    wants_optimizer,
    whole,
)
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.strategies import Strategy
from morphogen.state import RandomStreams

_LOG = logging.getLogger("morphogen.pbt")


_GLOBAL_NUMPY: Any = np.random  # its stubs lack the two functions that set the global bit generator


@dataclasses.dataclass(frozen=True)
class Birth:
    """How a member begins.

    Attributes:
        member: Its place in the population.
        hyperparameters: What it starts with.
        seed: Of its chance.
        state: All of an earlier life, as data, to go on from; None to begin from nothing.
    """

    member: int
    hyperparameters: Hyperparameters
    seed: int
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Succession:
    """How a member takes over another one.

    Attributes:
        member: Which.
        hyperparameters: To use afterwards.
        seed: Of its chance afterwards.
        optimizer: What becomes of moments.
    """

    member: int
    hyperparameters: Hyperparameters
    seed: int
    optimizer: Strategy


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an order to train.

    Attributes:
        member: Which.
        until: As ordered.
        trained: What it came to; None if it failed.
        problem: Why it failed; else empty.
        seconds: Of CPU time of its process.
    """

    member: int
    until: int
    trained: Trained | None
    problem: str = ""
    seconds: float = 0.0


class GlobalChance:
    """The global generators of torch, NumPy and Python as one member left them.

    Args:
        seed: Where they start.
        numpy: Used for NumPy's instead of a new one, which takes longer to make than all the rest.
    """

    def __init__(self, seed: int, numpy: np.random.MT19937 | None = None) -> None:
        """Change nothing yet."""
        words = RandomStreams(seed).sequence("global generators").generate_state(6, np.uint64)
        self._torch = torch.Generator().manual_seed(int(words[0])).get_state()
        self._python = random.Random(int(words[1])).getstate()
        self.numpy: Any = np.random.MT19937(0) if numpy is None else numpy
        np.random.RandomState(self.numpy).seed(words[2:].view(np.uint32))

    @contextlib.contextmanager
    def at_work(self) -> Generator[None]:
        """Within the block the global generators are the member's; afterwards they are as before."""
        before = torch.get_rng_state(), _GLOBAL_NUMPY.get_bit_generator(), random.getstate()
        torch.set_rng_state(self._torch)
        _GLOBAL_NUMPY.set_bit_generator(self.numpy)
        random.setstate(self._python)
        try:
            yield
        finally:
            self._torch, self._python = torch.get_rng_state(), random.getstate()
            torch.set_rng_state(before[0])
            _GLOBAL_NUMPY.set_bit_generator(before[1])
            random.setstate(before[2])

    def state_dict(self) -> dict[str, Any]:
        """Return where they are."""
        return {"torch": self._torch.clone(), "numpy": self.numpy.state, "python": self._python}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._torch, self._python = state["torch"], state["python"]
        self.numpy.state = state["numpy"]


class Members:
    """Members by place. What one of them raises is its own problem, and is returned.

    Args:
        factory: Makes them.
        metric: Name of the score in what they return.
    """

    def __init__(self, factory: Factory, metric: str) -> None:
        """Hold nobody."""
        self._factory, self._metric = factory, metric
        self._members: dict[int, Member] = {}
        self._chances: dict[int, GlobalChance] = {}
        self._spare: np.random.MT19937 | None = None
        self._values: dict[int, Hyperparameters] = {}

    def begin(self, birth: Birth) -> str:
        """Make a member, in place of the one before if there is one; returns what went wrong, "" if nothing."""
        self.end(birth.member)
        chance = GlobalChance(birth.seed)

        def make() -> None:
            member = self._factory(birth.member, dict(birth.hyperparameters), birth.seed)
            if birth.state is None:
                bind(member, birth.hyperparameters, f"member {birth.member}")
            else:
                make_whole(member, birth.state["member"])
            self._members[birth.member] = member

        with chance.at_work():
            problem = _problem(make)
        if birth.state is not None:
            chance.load_state_dict(birth.state["chance"])
        self._chances[birth.member], self._values[birth.member] = chance, birth.hyperparameters
        return problem

    def train(self, member: int, until: int) -> Outcome:
        """Train a member."""
        found: list[Trained] = []
        started = time.process_time()
        with self._chances[member].at_work():
            problem = _problem(lambda: found.append(trained_of(self._members[member].train(until), self._metric)))
        return Outcome(member, until, found[0] if found else None, problem, time.process_time() - started)

    def read(self, member: int, optimizer: Strategy) -> Mapping[str, Any] | None:
        """Return what a strategy needs of a member; None if it does not give it, which is logged."""
        if member not in self._members:
            return None
        found: list[Mapping[str, Any]] = []
        wanted = wants_optimizer(optimizer)
        with self._chances[member].at_work():  # a snapshot holds the global generators, too
            problem = _problem(lambda: found.append(self._members[member].get_parameters(include_optimizer=wanted)))
        if problem:
            _LOG.warning("member %d: its parameters cannot be read: %s", member, problem)
        return found[0] if found else None

    def take_over(self, succession: Succession, values: Mapping[str, Any]) -> str:
        """Let a member take over ``values``; returns what went wrong, "" if nothing."""
        number, chance = succession.member, GlobalChance(succession.seed, self._spare)

        def follow() -> None:
            member = self._members[number]
            member.apply_hyperparameters(dict(succession.hyperparameters))  # first moments are rescaled to the new rate
            take_over(member, values, succession.optimizer, succession.seed)
            bind(member, succession.hyperparameters, f"member {number}")

        with chance.at_work():
            problem = _problem(follow)
        if problem:
            self._spare = chance.numpy
            _problem(lambda: self._members[number].apply_hyperparameters(dict(self._values[number])))
        else:
            self._spare = self._chances[number].numpy
            self._chances[number], self._values[number] = chance, succession.hyperparameters
        return problem

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        """Let a member use other values; returns what went wrong, "" if nothing."""
        self._values[member] = hyperparameters
        return _problem(lambda: bind(self._members[member], hyperparameters, f"member {member}"))

    def save(self, member: int) -> dict[str, Any]:
        """Return all of a member that evolves."""
        with self._chances[member].at_work():
            state = whole(self._members[member])
        return {"member": state, "chance": self._chances[member].state_dict()}

    def check(self, optimizer: Strategy) -> None:
        """Check that the members can do what a strategy asks for; ValueError if not."""
        for member in self._members.values():
            check_strategy(member, optimizer)

    def end(self, member: int) -> None:
        """Let go of a member, if there is one."""
        old = self._members.pop(member, None)
        close = getattr(old, "close", None)
        if callable(close):
            _problem(close)

    def close(self) -> None:
        """Let go of everybody."""
        for member in list(self._members):
            self.end(member)


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Let torch use one thread in the block: what members compute must not depend on where they are."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


def _problem(action: Callable[[], object]) -> str:
    """Do it; returns what it raised in words, "" if nothing."""
    try:
        action()
    except MorphogenError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # border: a member is anybody's code, and the others must outlive it
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return ""
