"""Members shared out over worker processes, each of which holds several and trains one at a time."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import signal
import weakref
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Literal, cast

import torch

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.pbt.engines.hosting import Birth, Members, Outcome, Succession
from morphogen.pbt.member import Factory
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.snapshots import from_bytes, to_bytes, to_chunks, write_snapshot
from morphogen.pbt.strategies import Strategy
from morphogen.state.processes import available_cores

Command = Literal["begin", "check", "train", "read", "take_over", "explore", "save", "end"]
_CLOSING_SECONDS = 5.0
_FAILURES = (ValueError, TypeError, CheckpointError)


class SharedParcel:
    """Parameters in shared memory; it is given back when nobody refers to the parcel any more.

    Args:
        name: Of the memory.
        num_bytes: Of the parameters; the memory may be larger.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        """Attach to it."""
        self.name, self.num_bytes = name, num_bytes
        weakref.finalize(self, _give_back, SharedMemory(name))


class ProcessesEngine:
    """See :class:`~morphogen.pbt.engines.base.Engine`. Parameters are handed over in shared memory.

    Workers are spawned, never forked. One that dies takes its members with it: those come back as lost, and a new worker is
    started for whoever begins again there.

    Args:
        factory: Makes members; workers import it.
        metric: Name of the score in what they return.
        num_workers: Processes; by default one for each core.

    Raises:
        ValueError: There is not even one.
    """

    name = "processes"
    interruptible = True

    def __init__(self, factory: Factory, metric: str, *, num_workers: int | None = None) -> None:
        """Start nothing yet."""
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"`num_workers` must be at least 1, got {num_workers}. Leave it out for one for each core.")
        self._factory, self._metric = factory, metric
        self._num_workers = num_workers or available_cores()
        self._workers: dict[int, _Worker] = {}
        self._orders: collections.deque[tuple[int, int, Strategy | None]] = collections.deque()
        self._came_back: collections.deque[Outcome] = collections.deque()
        self._published: dict[int, SharedParcel] = {}
        self._lost: set[int] = set()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process_id for worker in self._workers.values()]

    def begin(self, births: Sequence[Birth]) -> dict[int, str]:
        """Make members, in new workers where there is none."""
        problems: dict[int, str] = {}
        by_worker: dict[int, list[Birth]] = {}
        for birth in births:
            by_worker.setdefault(birth.member % self._num_workers, []).append(_sendable(birth))
        for place in by_worker:
            if place not in self._workers:
                self._workers[place] = _Worker(self._factory, self._metric, place)
        for place, theirs in by_worker.items():
            self._workers[place].send("begin", theirs)
        for place, theirs in by_worker.items():
            answer = self._answer(place, "begin")
            problems |= dict.fromkeys((birth.member for birth in theirs), _DIED) if answer is _Dead else answer
            self._lost -= {birth.member for birth in theirs}
        return problems

    def check(self, optimizer: Strategy) -> None:
        """Check that members can do what a strategy asks for."""
        for place in list(self._workers):
            self._ask(place, "check", optimizer)

    def submit(self, member: int, until: int, *, publish: Strategy | None = None) -> None:
        """Put the order behind those before; a worker takes the next one when it has nothing to do."""
        self._orders.append((member, until, publish))

    def next(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Give orders to workers that have nothing to do, and wait for any of them."""
        self._dispatch()
        if self._came_back:
            return self._came_back.popleft()
        busy = {worker.pipe: place for place, worker in self._workers.items() if worker.training is not None}
        ready = wait(list(busy), timeout_seconds) if busy else []
        if not ready:
            return None
        place = busy[cast("Connection", ready[0])]
        worker = self._workers[place]
        assert worker.training is not None
        member, until = worker.training
        answer = self._answer(place, "train")
        if answer is _Dead:
            return Outcome(member, until, None, _DIED)
        outcome, published = answer
        if published is None:
            self._published.pop(member, None)
        else:
            self._published[member] = SharedParcel(*published)
        return outcome

    def lost(self) -> set[int]:
        """Return members that are gone with their worker, and have not begun again."""
        return set(self._lost)

    def read(self, member: int, optimizer: Strategy) -> SharedParcel | None:
        """Return what was published, or let the worker put the parameters into shared memory."""
        if member in self._published:
            return self._published[member]
        worker = self._workers.get(member % self._num_workers)
        if worker is None or worker.training is not None:
            return None
        answer = self._ask(member % self._num_workers, "read", (member, optimizer))
        return None if answer is _Dead or answer is None else SharedParcel(*answer)

    def values(self, member: int) -> Mapping[str, Any]:
        """Return the parameters, moments included."""
        answer = self._ask(member % self._num_workers, "read", (member, "copy"))
        if answer is _Dead:
            raise MorphogenError(f"member {member}: its process died when it was asked for its parameters. Resume the run.")
        if answer is None:
            raise MorphogenError(f"member {member}: its parameters cannot be read; the log says why. Repair `get_parameters`.")
        return _content(*answer, unlink=True)

    def take_over(self, succession: Succession, parcel: SharedParcel) -> str:
        """Let the worker copy the parcel."""
        order = succession, parcel.name, parcel.num_bytes
        answer = self._ask(succession.member % self._num_workers, "take_over", order)
        return _DIED if answer is _Dead else answer

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        """Let a member use other values."""
        answer = self._ask(member % self._num_workers, "explore", (member, dict(hyperparameters)))
        return _DIED if answer is _Dead else answer

    def save(self, member: int, folder: str) -> tuple[str, int] | None:
        """Let the worker write all of a member."""
        answer = self._ask(member % self._num_workers, "save", (member, folder))
        return None if answer is _Dead else answer

    def end(self, members: Collection[int]) -> set[int]:
        """End members: workers that train one of them are killed, with all they hold."""
        self._orders = collections.deque(order for order in self._orders if order[0] not in members)
        gone: set[int] = set()
        for place, worker in list(self._workers.items()):
            if worker.training is not None and worker.training[0] in members:
                gone |= worker.members
                worker.kill()
                self._bury(place)
        for member in set(members) - gone:
            if member % self._num_workers in self._workers:
                self._ask(member % self._num_workers, "end", member)
        return gone

    def close(self) -> None:
        """End every worker, whatever it is doing."""
        workers, self._workers = self._workers, {}
        self._orders.clear()
        self._published.clear()
        for worker in workers.values():
            worker.stop()
        for worker in workers.values():
            worker.end()

    # -- workers ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give each idle worker its oldest order."""
        waiting: list[tuple[int, int, Strategy | None]] = []
        for member, until, publish in self._orders:
            worker = self._workers.get(member % self._num_workers)
            if worker is None or member in self._lost:
                self._came_back.append(Outcome(member, until, None, _DIED))
            elif worker.training is None:
                worker.training = member, until
                worker.send("train", (member, until, publish))
            else:
                waiting.append((member, until, publish))
        self._orders = collections.deque(waiting)

    def _ask(self, place: int, command: Command, order: Any) -> Any:
        if place not in self._workers:
            return _Dead
        assert self._workers[place].training is None, f"{command} while the worker trains"
        self._workers[place].send(command, order)
        return self._answer(place, command)

    def _answer(self, place: int, command: Command) -> Any:
        """Wait for a worker's answer; ``_Dead`` if it has died. Raises what the worker itself could not do."""
        worker = self._workers[place]
        answer = worker.receive()
        worker.training = None
        if answer is None:
            self._bury(place)
            if not worker.was_ready:
                raise MorphogenError(
                    "a worker for members could not start; its own message is above. In a script that uses the engine "
                    '"processes", what runs must stand below `if __name__ == "__main__":`.'
                )
            return _Dead
        kind, value = answer
        if kind == "failed":
            name, message = value
            known = {error.__name__: error for error in _FAILURES}
            raise known.get(name, MorphogenError)(message)
        if command == "begin":
            worker.members |= set(cast("Mapping[str, set[int]]", value)["members"])
            return value["problems"]
        return value

    def _bury(self, place: int) -> None:
        worker = self._workers.pop(place)
        worker.end()
        self._lost |= worker.members
        for member in worker.members:
            self._published.pop(member, None)


class _Dead:
    """In place of the answer of a worker that died."""


_DIED = "its process died"


class _Worker:
    """A worker process, seen from outside.

    Attributes:
        members: Those it holds.
        training: Whom it trains now, and up to which step; None for nobody.
        was_ready: Whether it ever answered.
    """

    def __init__(self, factory: Factory, metric: str, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.members: set[int] = set()
        self.training: tuple[int, int] | None = None
        self.was_ready = False
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, factory, metric), name=f"members {place}", daemon=True)
        try:
            self._process.start()
        except (AttributeError, TypeError) as error:  # what spawn says of a function that cannot be imported
            self.pipe.close()
            raise ValueError(
                f'`member_factory` must be importable with the engine "processes", got {factory!r}: {error}. Define it at the '
                "top of a module, or use a frozen dataclass with __call__."
            ) from error
        finally:
            theirs.close()
        self.process_id = self._process.pid or 0

    def send(self, command: Command, order: Any) -> None:
        """Give an order; that the process is dead is noticed when the answer is awaited."""
        with contextlib.suppress(OSError):
            self.pipe.send((command, order))

    def receive(self) -> tuple[str, Any] | None:
        """Wait for the answer; None if the process is dead."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.was_ready = True
        return answer

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def stop(self) -> None:
        """Tell it to end."""
        self.pipe.close()
        self._process.terminate()

    def end(self) -> None:
        """Wait until it has ended, and see to it that it does."""
        self.pipe.close()
        self._process.join(_CLOSING_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()


# -- in the worker ----------------------------------------------------------------------------------------------------


def work(pipe: Connection, factory: Factory, metric: str) -> None:
    """Hold members and obey orders until the other end of ``pipe`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever gives the orders
    torch.set_num_threads(1)
    members = Members(factory, metric)
    with pipe, contextlib.closing(members):
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                command, order = pipe.recv()
                pipe.send(_obeyed(members, command, order))


def _obeyed(members: Members, command: Command, order: Any) -> tuple[str, Any]:
    try:
        return "done", _COMMANDS[command](members, order)
    except Exception as error:  # border: it belongs to whoever gave the order
        return "failed", (type(error).__name__, str(error))


def _begin(members: Members, births: Sequence[Birth]) -> dict[str, Any]:
    problems = {birth.member: members.begin(_received(birth)) for birth in births}
    return {"members": list(problems), "problems": {member: problem for member, problem in problems.items() if problem}}


def _train(members: Members, order: tuple[int, int, Strategy | None]) -> tuple[Outcome, tuple[str, int] | None]:
    member, until, publish = order
    outcome = members.train(member, until)
    if publish is None or outcome.trained is None:
        return outcome, None
    return outcome, _read(members, (member, publish))


def _read(members: Members, order: tuple[int, Strategy]) -> tuple[str, int] | None:
    values = members.read(*order)
    if values is None:
        return None
    chunks = to_chunks(values)
    memory = SharedMemory(create=True, size=sum(map(len, chunks)))
    end = 0
    for chunk in chunks:
        start, end = end, end + len(chunk)
        _view(memory)[start:end] = chunk
    memory.close()
    return memory.name, end


def _take_over(members: Members, order: tuple[Succession, str, int]) -> str:
    succession, name, num_bytes = order
    return members.take_over(succession, _content(name, num_bytes))


def _explore(members: Members, order: tuple[int, Hyperparameters]) -> str:
    return members.explore(*order)


def _save(members: Members, order: tuple[int, str]) -> tuple[str, int]:
    member, folder = order
    return write_snapshot(members.save(member), folder)


_COMMANDS: Mapping[Command, Any] = {
    "begin": _begin,
    "check": Members.check,
    "train": _train,
    "read": _read,
    "take_over": _take_over,
    "explore": _explore,
    "save": _save,
    "end": Members.end,
}


def _content(name: str, num_bytes: int, *, unlink: bool = False) -> dict[str, Any]:
    memory = SharedMemory(name)
    try:
        return from_bytes(bytearray(_view(memory)[:num_bytes]))
    finally:
        memory.close()
        if unlink:
            memory.unlink()


def _view(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def _give_back(memory: SharedMemory) -> None:
    memory.close()
    with contextlib.suppress(FileNotFoundError):
        memory.unlink()


def _sendable(birth: Birth) -> Birth:
    """Return ``birth`` with its state as bytes."""
    state = None if birth.state is None else to_bytes(birth.state)
    return Birth(birth.member, dict(birth.hyperparameters), birth.seed, state)


def _received(birth: Birth) -> Birth:
    state = None if birth.state is None else from_bytes(birth.state)
    return Birth(birth.member, birth.hyperparameters, birth.seed, state)
