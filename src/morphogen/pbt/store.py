"""Where a population keeps what happened: a SQLite file for reports and decisions, and files for snapshots beside it.

A row refers to a snapshot only once its file is whole, and a file goes only once no row refers to it: whoever is killed in
between leaves at most a file that nobody refers to, which the next one to open the directory removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from morphogen.errors import MorphogenError
from morphogen.pbt.history import Exploit, MemberReport
from morphogen.pbt.snapshots import SUFFIX

_FILE, _FOLDER, _LOCK = "population.db", "snapshots", "lock"
FORMAT = "morphogen-population-1"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (digest TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS reports (
    member INTEGER NOT NULL, interval INTEGER NOT NULL, step INTEGER NOT NULL, score REAL, scores TEXT NOT NULL,
    metrics TEXT NOT NULL, hyperparameters TEXT NOT NULL, seed TEXT NOT NULL, problem TEXT NOT NULL, cpu_seconds REAL NOT NULL,
    snapshot TEXT REFERENCES snapshots (digest), PRIMARY KEY (member, interval));
CREATE TABLE IF NOT EXISTS exploits (
    event INTEGER NOT NULL, member INTEGER NOT NULL, interval INTEGER NOT NULL, reason TEXT NOT NULL, source INTEGER NOT NULL,
    source_step INTEGER NOT NULL, source_interval INTEGER NOT NULL, score_before REAL, source_score REAL, score_after REAL,
    strategy TEXT NOT NULL, hyperparameters_before TEXT NOT NULL, hyperparameters TEXT NOT NULL, moves TEXT NOT NULL,
    seed TEXT NOT NULL, source_snapshot TEXT, refused TEXT NOT NULL, PRIMARY KEY (event, member));
CREATE INDEX IF NOT EXISTS references_of ON reports (snapshot);
CREATE VIEW IF NOT EXISTS live_snapshots AS
    SELECT digest, num_bytes, (SELECT COUNT(*) FROM reports WHERE snapshot = digest) AS num_references FROM snapshots;
CREATE VIEW IF NOT EXISTS success_by_strategy AS
    SELECT strategy, COUNT(*) AS exploits, AVG(score_after > score_before) AS above_own_past,
           AVG(score_after > source_score) AS above_source, AVG(score_after - source_score) AS mean_gain_on_source
    FROM exploits WHERE reason <> 'explore' AND score_after IS NOT NULL GROUP BY strategy;
"""


class Store:
    """The directory of a population.

    Args:
        path: Directory, made if missing.

    Raises:
        MorphogenError: Another process uses it, or it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        """Lock and open it, and remove files that nobody refers to."""
        self.path = path
        try:
            (path / _FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = open(path / _LOCK, "a")  # noqa: SIM115  closed in `close`
        except OSError as error:
            raise MorphogenError(f"{path}: cannot be written: {error.strerror}. Choose another directory.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise MorphogenError(
                f"{path}: is in use by another run. Wait for it or end it, or choose another directory."
            ) from error
        try:
            self._database = sqlite3.connect(path / _FILE, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_SCHEMA)
            self._remove_strays()
        except sqlite3.Error as error:
            self._lock.close()
            raise MorphogenError(
                f"{path / _FILE}: cannot be used: {error}. Restore it, or begin in a new directory."
            ) from error

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self.close()

    @property
    def folder(self) -> str:
        """Where snapshots are."""
        return str(self.path / _FOLDER)

    def close(self) -> None:
        """Close and unlock it."""
        self._database.close()
        self._lock.close()

    # -- facts ------------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Return what :meth:`note` wrote, or None."""
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def note(self, **facts: Any) -> None:
        """Write plain data by name, in place of what was there."""
        with self._transaction():
            for name, value in facts.items():
                self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # -- reports and exploits ---------------------------------------------------------------------------------------

    def add_report(self, report: MemberReport, num_bytes: int = 0) -> None:
        """Write a report, whose snapshot is there; the exploit before it learns what it came to."""
        row = (
            *(report.member, report.interval, report.step, _finite(report.score), json.dumps(report.scores)),
            *(json.dumps(dict(report.metrics)), json.dumps(dict(report.hyperparameters)), str(report.seed)),
            *(report.problem, report.cpu_seconds, report.snapshot),
        )
        with self._transaction():
            if report.snapshot is not None:
                self._database.execute("INSERT OR IGNORE INTO snapshots VALUES (?, ?)", (report.snapshot, num_bytes))
            self._database.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._database.execute(
                "UPDATE exploits SET score_after = ? WHERE member = ? AND interval = ?",
                (_finite(report.score), report.member, report.interval - 1),
            )

    def add_exploits(self, exploits: Sequence[Exploit]) -> None:
        """Write what was decided and done."""
        with self._transaction():
            for exploit in exploits:
                self._database.execute(
                    "INSERT OR REPLACE INTO exploits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    _row_of(exploit),
                )

    def forget_exploits(self, interval: int, member: int | None = None) -> None:
        """Let go of what was done after ``interval`` or later, to all or to one: it is decided again."""
        with self._transaction():
            self._database.execute(
                "DELETE FROM exploits WHERE interval >= ? AND member = IFNULL(?, member)", (interval, member)
            )

    def reports(self) -> list[MemberReport]:
        """Return all reports, by interval and member."""
        rows = self._database.execute(
            "SELECT member, interval, step, score, scores, metrics, hyperparameters, seed, problem, cpu_seconds, snapshot "
            "FROM reports ORDER BY interval, member"
        )
        return [
            MemberReport(
                member=member,
                interval=interval,
                step=step,
                score=math.nan if score is None else score,
                scores=tuple(json.loads(scores)),
                metrics=json.loads(metrics),
                hyperparameters=json.loads(values),
                seed=int(seed),
                problem=problem,
                cpu_seconds=seconds,
                snapshot=snapshot,
            )
            for member, interval, step, score, scores, metrics, values, seed, problem, seconds, snapshot in rows
        ]

    def exploits(self) -> list[Exploit]:
        """Return all exploits and explorations, in the order of their events."""
        rows = self._database.execute(
            "SELECT event, member, interval, reason, source, source_step, source_interval, score_before, source_score, "
            "score_after, strategy, hyperparameters_before, hyperparameters, moves, seed, source_snapshot, refused "
            "FROM exploits ORDER BY event, member"
        )
        return [_exploit_of(row) for row in rows]

    def forget_before(self, interval: int) -> None:
        """Let go of the snapshots of reports before ``interval``: of each member the later ones stay."""
        with self._transaction():
            self._database.execute("UPDATE reports SET snapshot = NULL WHERE interval < ?", (interval,))
        self._collect()

    def keep_latest(self, member: int, interval: int) -> None:
        """Let go of the snapshots of ``member`` before ``interval``."""
        with self._transaction():
            self._database.execute("UPDATE reports SET snapshot = NULL WHERE member = ? AND interval < ?", (member, interval))
        self._collect()

    # -- files ------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Remove snapshots without a reference: first the rows, then the files."""
        gone = [digest for (digest,) in self._database.execute("SELECT digest FROM live_snapshots WHERE num_references = 0")]
        with self._transaction():
            self._database.executemany("DELETE FROM snapshots WHERE digest = ?", [(digest,) for digest in gone])
        for digest in gone:
            Path(self.folder, digest + SUFFIX).unlink(missing_ok=True)

    def _remove_strays(self) -> None:
        known = {digest + SUFFIX for (digest,) in self._database.execute("SELECT digest FROM snapshots")}
        for file in Path(self.folder).iterdir():
            if file.name not in known:
                file.unlink()

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.Error as error:
            raise MorphogenError(
                f"{self.path / _FILE}: cannot be written: {error}. Make room and resume; what was there is whole."
            ) from error


def _finite(value: float) -> float | None:
    """Return ``value``, or None for what SQLite cannot compare."""
    return value if math.isfinite(value) else None


def _row_of(exploit: Exploit) -> tuple[Any, ...]:
    return (
        *(exploit.event, exploit.member, exploit.interval, exploit.reason, exploit.source, exploit.source_step),
        *(exploit.source_interval, _finite(exploit.score_before), _finite(exploit.source_score)),
        *(None if exploit.score_after is None else _finite(exploit.score_after), exploit.strategy),
        *(json.dumps(dict(values)) for values in (exploit.hyperparameters_before, exploit.hyperparameters, exploit.moves)),
        *(str(exploit.seed), exploit.source_snapshot, json.dumps([list(each) for each in exploit.refused])),
    )


def _exploit_of(row: Sequence[Any]) -> Exploit:
    event, member, interval, reason, source, source_step, source_interval, before, theirs, after, strategy = row[:11]
    values_before, values, moves, seed, snapshot, refused = row[11:]
    loaded: list[Mapping[str, Any]] = [json.loads(text) for text in (values_before, values, moves)]
    return Exploit(
        event=event,
        member=member,
        interval=interval,
        reason=reason,
        source=source,
        source_step=source_step,
        source_interval=source_interval,
        score_before=math.nan if before is None else before,
        source_score=math.nan if theirs is None else theirs,
        score_after=after,
        strategy=strategy,
        hyperparameters_before=loaded[0],
        hyperparameters=loaded[1],
        moves=dict(loaded[2]),
        seed=int(seed),
        source_snapshot=snapshot,
        refused=tuple((int(number), str(why)) for number, why in json.loads(refused)),
    )
