"""Members as Ray actors, one for each, on this machine or on a cluster."""

from __future__ import annotations

import collections
import dataclasses
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from morphogen.errors import MorphogenError
from morphogen.pbt.engines.hosting import Birth, Members, Outcome, Succession
from morphogen.pbt.member import Factory
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.snapshots import from_bytes, to_bytes, write_bytes
from morphogen.pbt.strategies import Strategy

try:
    import ray
    from ray.exceptions import ObjectLostError, RayError, RayTaskError
except ImportError as error:
    raise MorphogenError("Ray is not installed. Run: pip install 'morphogen[ray]'") from error

_LEAST_CPUS = 0.001  # what asks for nothing Ray puts on any node; the rest it spreads
_KNOCK_SECONDS = 10.0
_CLOSING_SECONDS = 5.0
_ray: Any = ray  # actors and their methods are made at run time: no type checker knows them


class RayEngine:
    """See :class:`~morphogen.pbt.engines.base.Engine`. Parameters are handed over as references to objects of Ray's store.

    They go from actor to actor, and from node to node, without passing through the process that decides; only what it writes
    into the run directory comes to it, so nodes need not share a file system. A member whose actor or node dies comes back as
    lost; when it begins again it gets a new actor, on whichever node has room.

    Args:
        factory: Makes members; serialised by Ray, so that what it imports must be importable on every node.
        metric: Name of the score in what they return.
        address: Of a cluster, as for ``ray.init``. None: what this process is connected to already, else what ``ray.init()``
            finds or starts. To start Ray with settings of your own, call ``ray.init`` first.
        num_cpus_per_member: Cores that Ray sets aside for each, >= 0; parts are allowed. 0: none, so that any number of members
            finds room, spread evenly over the nodes.
        num_gpus_per_member: GPUs likewise; with 0.25 four members share one.
        runtime_env: Of the actors, as for Ray.
        start_seconds: How long a member may wait for room and for its process, > 0.

    Raises:
        ValueError: An option is out of range, this process is connected already, or Ray cannot serialise the factory.
        MorphogenError: There is no cluster at that address, or Ray does not start.
    """

    name = "ray"
    interruptible = True

    def __init__(
        self,
        factory: Factory,
        metric: str,
        *,
        address: str | None = None,
        num_cpus_per_member: float = 0.0,
        num_gpus_per_member: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
        start_seconds: float = 300.0,
    ) -> None:
        """Connect to Ray; no actor is made yet."""
        for name, value in (("num_cpus_per_member", num_cpus_per_member), ("num_gpus_per_member", num_gpus_per_member)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}. Parts such as 0.25 are allowed.")
        if not start_seconds > 0:
            raise ValueError(f"`start_seconds` must be above 0, got {start_seconds}. A process takes seconds to start.")
        self._start_seconds = start_seconds
        self._asks = f"{num_cpus_per_member:g} CPU, {num_gpus_per_member:g} GPU"
        self._is_ours = _connect(address)
        self._actors: dict[int, _Actor] = {}
        self._orders: dict[Any, tuple[int, int, Any]] = {}
        self._published: dict[int, Any] = {}
        self._resumed: set[int] = set()
        self._lost: set[int] = set()
        self._came_back: collections.deque[Outcome] = collections.deque()
        self._has_begun = False
        settings: dict[str, Any] = {"num_cpus": max(num_cpus_per_member, _LEAST_CPUS), "num_gpus": num_gpus_per_member}
        if runtime_env is not None:
            settings["runtime_env"] = dict(runtime_env)
        try:
            self._actor_class = _ray.remote(_Host).options(**settings, scheduling_strategy="SPREAD", max_restarts=0)
            self._arguments = _ray.put(factory), metric
        except (TypeError, ValueError) as error:
            self.close()
            given = f"{factory!r}, {settings}"
            raise ValueError(f"`member_factory` and options must be what Ray can use, got {given}: {error}") from error

    # -- beginning --------------------------------------------------------------------------------------------------

    def begin(self, births: Sequence[Birth]) -> dict[int, str]:
        """Make members, in new actors where there is none alive.

        Raises:
            MorphogenError: At the beginning of a run an actor cannot start, or finds no room in time.
        """
        problems = self._place([birth.member for birth in births])
        if problems and not self._has_begun:
            raise MorphogenError(f"member {min(problems)}: {problems[min(problems)]}")
        self._has_begun = self._has_begun or bool(births)
        begun: dict[int, Any] = {}
        for birth in births:
            if birth.member in problems:
                continue
            self._published.pop(birth.member, None)
            self._resumed.discard(birth.member)
            self._lost.discard(birth.member)
            state = None
            if birth.state is not None:
                state = to_bytes(birth.state)
                self._resumed.add(birth.member)
            plain = dataclasses.replace(birth, hyperparameters=dict(birth.hyperparameters), state=None)
            begun[birth.member] = self._actors[birth.member].handle.begin.remote(plain, state)
        problems |= {member: _words(answer) for member, answer in begun.items()}
        return {member: problem for member, problem in problems.items() if problem}

    def _place(self, members: Collection[int]) -> dict[int, str]:
        """See that members have actors that live; returns what is in the way by member. Those that wait go on waiting."""
        for member in members:
            actor = self._actors.get(member)
            if actor is None or not actor.may_live():
                self._actors[member] = _Actor(self._actor_class.remote(*self._arguments))
        problems: dict[int, str] = {}
        for member in members:
            actor = self._actors[member]
            if not actor.is_there(self._start_seconds):
                problems[member] = (
                    f"its actor has not started within {self._start_seconds:g} s: it asks for {self._asks}, the cluster has "
                    f"{_resources()}. Ask for less, add nodes, or give `start_seconds` more."
                )
            elif problem := _words(actor.started):
                problems[member] = problem
                self._kill(member)
        return problems

    def check(self, optimizer: Strategy) -> None:
        """Check that members can do what a strategy asks for."""
        answers = {member: actor.handle.check.remote(optimizer) for member, actor in self._idle().items()}
        for problem in [self._got(member, answer) for member, answer in answers.items()]:
            if problem:
                raise ValueError(problem)

    # -- training ---------------------------------------------------------------------------------------------------

    def submit(self, member: int, until: int, *, publish: Strategy | None = None) -> None:
        """Order a member to train; with ``publish`` its parameters are left in Ray's store when it is done."""
        if member not in self._actors:
            self._came_back.append(Outcome(member, until, None, _GONE))
            return
        handle = self._actors[member].handle
        if publish is not None and member in self._resumed:  # it has reported, and may be asked for before it does again
            self._published[member] = self._leave(member, publish)[1]
            self._resumed.discard(member)
        done, parcel = handle.train.options(num_returns=2).remote(member, until, publish)
        self._orders[done] = member, until, parcel

    def next(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Wait for any of the orders."""
        if self._came_back:
            return self._came_back.popleft()
        if not self._orders:
            return None
        ready, _ = _ray.wait(list(self._orders), timeout=timeout_seconds)
        if not ready:
            return None
        member, until, parcel = self._orders.pop(ready[0])
        try:
            outcome, is_left = _ray.get(ready[0])
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            self._bury(member)
            return Outcome(member, until, None, _death(error))
        self._published.pop(member, None)
        if is_left:
            self._published[member] = parcel
        return outcome

    def lost(self) -> set[int]:
        """Return members whose actors died, also those that had nothing to do."""
        answers = {member: actor.handle.start.remote() for member, actor in self._idle().items()}
        for member, answer in answers.items():
            if _words(answer):
                self._bury(member)
        return set(self._lost)

    # -- handing over -----------------------------------------------------------------------------------------------

    def read(self, member: int, optimizer: Strategy) -> Any:
        """Return a reference to what was published, else to what the actor leaves now; None if it is dead or trains."""
        if member in self._published:
            return self._published[member]
        if member not in self._idle():
            return None
        is_left, parcel = self._leave(member, optimizer)
        return parcel if self._got(member, is_left) else None

    def values(self, member: int) -> Mapping[str, Any]:
        """Return the parameters, moments included."""
        content = self._got(member, self._leave(member, "copy")[1]) if member in self._actors else None
        if content is None:
            raise MorphogenError(
                f"member {member}: its parameters cannot be read; its actor died, or its log says why. Resume the run."
            )
        return from_bytes(content)

    def take_over(self, succession: Succession, parcel: Any) -> str:
        """Let the actor take over what the reference stands for."""
        return self._asked(succession.member, "take_over", succession, parcel)

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        """Let a member use other values."""
        return self._asked(member, "explore", member, dict(hyperparameters))

    def save(self, member: int, folder: str) -> tuple[str, int] | None:
        """Write all of a member, which its actor sends."""
        content = self._got(member, self._actors[member].handle.save.remote(member)) if member in self._actors else None
        return None if content is None else write_bytes(content, folder)

    def _leave(self, member: int, optimizer: Strategy) -> tuple[Any, Any]:
        """Let a member leave its parameters; returns references: to whether it did, and to them."""
        return self._actors[member].handle.read.options(num_returns=2).remote(member, optimizer)

    def _got(self, member: int, reference: Any) -> Any:
        """Return what an actor answered, None if it died. Raises what it raised."""
        try:
            return _ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError:
            self._bury(member)
            return None

    def _asked(self, member: int, command: str, *order: Any) -> str:
        """Return what went wrong with an order."""
        if member not in self._actors:
            return _GONE
        return _words(getattr(self._actors[member].handle, command).remote(*order))

    # -- ending -----------------------------------------------------------------------------------------------------

    def end(self, members: Collection[int]) -> set[int]:
        """Kill their actors; nobody else is in them."""
        for member in members:
            self._kill(member)
        return set()

    def close(self) -> None:
        """Let idle members close what they hold, and kill all actors; stop Ray if it was started for them."""
        if _ray.is_initialized():
            closing = [actor.handle.close.remote() for actor in self._idle().values()]
            if closing:
                _ray.wait(closing, num_returns=len(closing), timeout=_CLOSING_SECONDS)
        self.end(list(self._actors))
        self._published.clear()
        if self._is_ours:
            self._is_ours = False
            _ray.shutdown()

    def _idle(self) -> dict[int, _Actor]:
        """Return actors that have started and do not train."""
        busy = {member for member, _, _ in self._orders.values()}
        return {member: actor for member, actor in self._actors.items() if member not in busy and actor.is_there(0.0)}

    def _bury(self, member: int) -> None:
        """Note that an actor died."""
        self._kill(member)
        self._lost.add(member)

    def _kill(self, member: int) -> None:
        actor = self._actors.pop(member, None)
        self._orders = {order: facts for order, facts in self._orders.items() if facts[0] != member}
        self._lost.discard(member)
        if actor is not None and _ray.is_initialized():
            _ray.kill(actor.handle)


class _Actor:
    """An actor, seen from outside.

    Attributes:
        handle: Of Ray.
        started: Reference to nothing, there as soon as the actor is.
    """

    def __init__(self, handle: Any) -> None:
        self.handle, self.started = handle, handle.start.remote()
        self._asked_seconds = time.monotonic()

    def is_there(self, start_seconds: float) -> bool:
        """Return whether it has started, or failed to, as late as ``start_seconds`` after it was asked for."""
        remaining = self._asked_seconds + start_seconds - time.monotonic()
        return bool(_ray.wait([self.started], timeout=max(0.0, remaining))[0])

    def may_live(self) -> bool:
        """Return whether it answers, or has not started yet."""
        return not self.is_there(0.0) or not _words(self.handle.start.remote())


class _Host:
    """What runs in an actor: a member, and nobody else."""

    def __init__(self, factory: Factory, metric: str) -> None:
        torch.set_num_threads(1)
        self._members = Members(factory, metric)

    def start(self) -> str:
        return ""

    def begin(self, birth: Birth, state: bytes | None) -> str:
        return self._members.begin(birth if state is None else dataclasses.replace(birth, state=from_bytes(state)))

    def check(self, optimizer: Strategy) -> str:
        try:
            self._members.check(optimizer)
        except ValueError as error:
            return str(error)
        return ""

    def train(self, member: int, until: int, publish: Strategy | None) -> tuple[tuple[Outcome, bool], bytes | None]:
        outcome = self._members.train(member, until)
        if publish is None or outcome.trained is None:
            return (outcome, False), None
        is_left, content = self.read(member, publish)
        return (outcome, is_left), content

    def read(self, member: int, optimizer: Strategy) -> tuple[bool, bytes | None]:
        values = self._members.read(member, optimizer)
        return values is not None, None if values is None else to_bytes(values)

    def take_over(self, succession: Succession, parcel: bytes) -> str:
        return self._members.take_over(succession, from_bytes(parcel))

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        return self._members.explore(member, hyperparameters)

    def save(self, member: int) -> bytes:
        return to_bytes(self._members.save(member))

    def close(self) -> None:
        self._members.close()


_GONE = "its actor is gone"


def _connect(address: str | None) -> bool:
    """Connect this process to Ray; returns whether it was not before."""
    if _ray.is_initialized():
        if address is not None:
            raise ValueError(f"`address` must be left out, got {address!r}: this process is connected to Ray already.")
        return False
    try:
        if address is not None:
            _knock(address)
        _ray.init(address=address)
    except ValueError:
        raise
    except Exception as error:  # border: Ray raises all kinds, plain Exception for a node that does not start
        where = "could not be started" if address is None else f"cannot be reached at {address!r}"
        hint = "See /tmp/ray for its logs." if address is None else "Start a cluster with `ray start --head`."
        raise MorphogenError(f"Ray {where}: {error}. {hint}") from error
    return True


def _knock(address: str) -> None:
    """See that somebody listens at an address with a port: Ray itself would try for minutes. OSError if not."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


def _resources() -> str:
    there = _ray.cluster_resources()
    return f"{there.get('CPU', 0):g} CPU, {there.get('GPU', 0):g} GPU"


def _words(reference: Any) -> str:
    """Return what an actor answered, or why it did not."""
    try:
        return _ray.get(reference)
    except ObjectLostError:
        return "the parameters that it was to take over were lost with their node"
    except RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except RayError as error:
        return _death(error)


def _death(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"its actor died: {lines[-1] if lines else type(error).__name__}"
