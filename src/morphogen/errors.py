"""The kinds of failure a caller may want to catch.

Misuse raises ``ValueError`` or ``TypeError``; what is listed here can happen to a correct program. Every message says what
was found, what was expected and what to do.
"""

from __future__ import annotations


class MorphogenError(Exception):
    """Base of every morphogen error that a correct program may meet."""


class StateMismatch(MorphogenError, ValueError):
    """The parts of a training run do not fit each other, or do not fit a snapshot.

    Attributes:
        problems: One line for each disagreement found, each naming the parameter, group or part.
    """

    def __init__(self, headline: str, problems: tuple[str, ...] = ()) -> None:
        """Join ``headline`` and ``problems`` into one message, the problems one to a line."""
        self.problems = problems
        super().__init__("\n  ".join((headline, *problems)))


class CheckpointError(MorphogenError):
    """A checkpoint could not be written, read or trusted; the message starts with the file's path."""


class SlotError(MorphogenError, ValueError):
    """An operation does not apply to this slot now; the model is as it was before the call."""


class TrainingCollapsed(MorphogenError):
    """The governor's last resort failed: the fault came back after every rewind it may make.

    The run is left at the oldest snapshot that proved good.

    Attributes:
        findings: The evidence of the last fault.
        report: The governor's report, as by ``Governor.report()``.
    """

    def __init__(self, message: str, findings: tuple[object, ...] = (), report: object = None) -> None:
        """Keep the evidence beside the message."""
        self.findings = findings
        self.report = report
        super().__init__(message)


class UpdateDiverged(MorphogenError):
    """Minibatch after minibatch was not finite; none of them changed anything, and what was learned before is whole."""


class DataError(MorphogenError):
    """The files of a data set are not here, damaged, or not what they should be; the message says how to get them."""


class EnvironmentFault(MorphogenError):
    """An environment raised, or gave something that cannot be learned from; the learner's own state is whole.

    Attributes:
        env_index: The environment at fault within its vector, where it can be known.
    """

    def __init__(self, message: str, env_index: int | None = None) -> None:
        """Keep the index beside the message."""
        self.env_index = env_index
        super().__init__(message)


class EpisodeFailed(MorphogenError):
    """A network that is trained in an episode came to nothing; no other is affected, and the next episode can begin."""


class WorkerDied(MorphogenError):
    """A process that plays environments died, again and again; what was saved before can be loaded.

    Attributes:
        env_indices: The environments it played.
    """

    def __init__(self, message: str, env_indices: tuple[int, ...] = ()) -> None:
        """Keep the indices beside the message."""
        self.env_indices = env_indices
        super().__init__(message)
