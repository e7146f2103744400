# SPDX-License-Identifier: Apache-2.0
"""Storage: studies, generations, evaluations and reusable values, committed to a database by row.

The only file that imports SQLAlchemy. SQLite in WAL mode by default, PostgreSQL by URL, JSON text
for what is structured; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.pool import StaticPool

from lightning_subnet._json import differences
from lightning_subnet.errors import StorageError, StudyMismatchError, TellError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study import _sqlite
from lightning_subnet.study.history import Evaluation

_FORMAT = "1"
_TRIES = 50
_meta = sa.MetaData()
_format = sa.Table("subnet_format", _meta, sa.Column("version", sa.String, primary_key=True))
_studies = sa.Table(
    "subnet_study",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("header", sa.Text, nullable=False),
    sa.Column("space", sa.Text, nullable=False),
    sa.Column("versions", sa.Text, nullable=False),
    sa.Column("created", sa.String, nullable=False),
)
_generations = sa.Table(
    "subnet_generation",
    _meta,
    sa.Column("study", sa.ForeignKey("subnet_study.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("subnets", sa.Text, nullable=False),
)
_evaluations = sa.Table(
    "subnet_evaluation",
    _meta,
    sa.Column("study", sa.ForeignKey("subnet_study.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.UniqueConstraint("study", "key"),
)
_values = sa.Table(
    "subnet_value",
    _meta,
    sa.Column("fingerprint", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("error", sa.Double, nullable=False),
)


class Storage:
    """A database of studies. Nothing is created before the first write.

    Args:
        url: A database URL such as `"sqlite:///search.db"`; None is a database in memory.

    Raises:
        StorageError: Not a URL, or a place that cannot be written.

    Example:
        >>> storage = Storage(None)
        >>> storage.study_names()
        []
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = "sqlite://" if url is None else url
        try:
            self._url = make_url(self.url)
            memory = self._url.get_backend_name() == "sqlite" and self._url.database in (
                None,
                "",
                ":memory:",
            )
            options: dict[str, Any] = {"poolclass": StaticPool} if memory else {}
            if self._url.get_backend_name() == "sqlite":
                options["connect_args"] = {"timeout": _sqlite.WAIT, "check_same_thread": False}
            self._engine = sa.create_engine(self._url, pool_pre_ping=True, **options)
        except (sa.exc.ArgumentError, ImportError, AttributeError) as error:
            msg = (
                f"storage={url!r} cannot be used ({error}). "
                'Give a URL such as "sqlite:///search.db", or None for memory only.'
            )
            raise StorageError(msg) from error
        self._path = None
        if self._url.get_backend_name() == "sqlite":
            sa.event.listen(
                self._engine, "connect", lambda new, _: _sqlite.configure(new, _format.name)
            )
            sa.event.listen(self._engine, "begin", _sqlite.begin)
            if not memory and not str(self._url.database).startswith("file:"):
                self._path = Path(str(self._url.database))
                self._check_place(self._path)
        self._ready = False

    def study_names(self) -> list[str]:
        """Return the names of the studies, oldest first."""
        if not self._exists():
            return []
        with self.transaction(write=False) as connection:
            return list(connection.scalars(sa.select(_studies.c.name).order_by(_studies.c.id)))

    def find_study(self, name: str) -> Study | None:
        """Return the study of that name, or None."""
        if not self._exists():
            return None
        with self.transaction(write=False) as connection:
            row = connection.execute(
                sa.select(_studies).where(_studies.c.name == name)
            ).one_or_none()
        return None if row is None else Study(self, row)

    def create_study(
        self, name: str, header: Mapping[str, Any], space: SearchSpace, versions: Mapping[str, str]
    ) -> Study:
        """Create a study, or return the one that another process created at the same moment."""
        self._create()
        row = {
            "name": name,
            "header": json.dumps(header),
            "space": json.dumps(space.to_json()),
            "versions": json.dumps(versions),
            "created": datetime.now(UTC).isoformat(),
        }
        try:
            with self.transaction(write=True) as connection:
                connection.execute(_studies.insert().values(row))
        except sa.exc.IntegrityError:
            pass  # created between our look and our write; the caller compares the headers
        study = self.find_study(name)
        assert study is not None
        study.check(header)
        return study

    def known_values(
        self, fingerprints: Mapping[str, str], subnet: Subnet
    ) -> dict[str, tuple[float, float]]:
        """Return stored (value, standard error) by name of measure.

        Args:
            fingerprints: The fingerprint of each measure, by name.
            subnet: The subnet.
        """
        if not fingerprints or not self._exists():
            return {}
        query = sa.select(_values).where(
            _values.c.key == subnet.key, _values.c.fingerprint.in_(list(fingerprints.values()))
        )
        with self.transaction(write=False) as connection:
            pairs = {row.fingerprint: (row.value, row.error) for row in connection.execute(query)}
        return {name: pairs[key] for name, key in fingerprints.items() if key in pairs}

    def values_of(self, fingerprint: str) -> dict[str, tuple[float, float]]:
        """Return stored (value, standard error) under a fingerprint, by key of the subnet."""
        if not self._exists():
            return {}
        query = sa.select(_values).where(_values.c.fingerprint == fingerprint)
        with self.transaction(write=False) as connection:
            return {row.key: (row.value, row.error) for row in connection.execute(query)}

    def keep_value(self, fingerprint: str, subnet: Subnet, value: float, error: float) -> None:
        """Store a value under a fingerprint, unless there is one; the first stays."""
        with self.transaction(write=True) as connection:
            _keep(connection, fingerprint, subnet, value, error)

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[sa.Connection]:
        """Open a transaction.

        Args:
            write: Whether it writes; then it waits for others that do.

        Raises:
            StorageError: What the driver's error says, and what to do.
        """
        try:
            connection = self._engine.connect().execution_options(subnet_write=write)
            with connection, connection.begin():
                yield connection
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).splitlines()[0]
            if "not a database" in reason or "malformed" in reason:
                hint = "The file is damaged, or not of SQLite: move it away, or name another file."
            elif "locked" in reason:
                hint = "Another process holds it for minutes: is one of them stopped?"
            else:
                hint = "Check that the place exists, is writable and has room."
            msg = f"storage={self.url!r} failed: {reason}. {hint}"
            raise StorageError(msg) from error

    def _check_place(self, path: Path) -> None:
        """Raise `StorageError` if a file cannot be written there."""
        folder = path.resolve().parent
        problem = ""
        if not folder.is_dir():
            problem = f"the folder {folder} does not exist: create it"
        elif path.is_dir():
            problem = "it is a folder: name a file in it"
        elif not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            locked = folder if not path.exists() else path
            problem = f"{locked} is read-only: choose a place you can write"
        if problem:
            msg = f"storage={self.url!r} cannot be written: {problem}."
            raise StorageError(msg)

    def _exists(self) -> bool:
        """Return whether the tables are there; refuse a database of something else."""
        if self._ready:
            return True
        if self._path is not None and not self._path.exists():
            return False
        with self.transaction(write=False) as connection:
            tables = set(sa.inspect(connection).get_table_names())
            if _format.name not in tables:
                if tables and self._path is not None:
                    msg = (
                        f"storage={self.url!r} is a database of something else (its tables: "
                        f"{', '.join(sorted(tables)[:5])}). Name a new file."
                    )
                    raise StorageError(msg)
                return False
            version = connection.scalar(sa.select(_format.c.version))
        if version is not None and version != _FORMAT:
            msg = (
                f"storage={self.url!r} has format {version}; "
                f"this version of the package reads {_FORMAT}."
            )
            raise StorageError(msg)
        self._ready = version is not None
        return self._ready

    def _create(self) -> None:
        """Create the tables where there are none."""
        if self._exists():
            return
        try:
            with self.transaction(write=True) as connection:
                _meta.create_all(connection)
                if connection.scalar(sa.select(_format.c.version)) is None:
                    connection.execute(_format.insert().values(version=_FORMAT))
        except (sa.exc.IntegrityError, StorageError):
            # On PostgreSQL several writers may create the tables at once; one of them succeeds.
            for _ in range(_TRIES):
                if self._exists():
                    break
                time.sleep(0.1)
            else:
                raise
        self._ready = True


class Study:
    """One search in a storage: its header, generations and evaluations.

    Attributes:
        storage: The storage that it is in.
        name: Its name there.
        header: The settings it was made with, which must be equal to go on.
        versions: The versions of packages it was made with.
    """

    def __init__(self, storage: Storage, row: Any) -> None:
        self.storage = storage
        self.name: str = row.name
        self.header: dict[str, Any] = json.loads(row.header)
        self.versions: dict[str, str] = json.loads(row.versions)
        self._space = row.space
        self._id: int = row.id

    @property
    def space(self) -> SearchSpace:
        """The space that the study was made with."""
        return SearchSpace.from_json(self._space)

    def differences(self, header: Mapping[str, Any]) -> list[str]:
        """Return the differences of a header from the stored one, as texts."""
        return list(differences(self.header, json.loads(json.dumps(header))))

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise `StudyMismatchError` naming the differences if the stored header is another one."""
        if lines := self.differences(header):
            shown = "; ".join(lines[:4]) + ("; ..." if len(lines) > 4 else "")  # noqa: PLR2004 - a few do
            msg = (
                f"Study {self.name!r} in {self.storage.url!r} was made with other settings: "
                f"{shown}.\nRestore them to resume it, or give this search another name=."
            )
            raise StudyMismatchError(msg)

    def generations(self, space: SearchSpace) -> list[list[Subnet]]:
        """Return the committed proposals, in order."""
        query = (
            sa.select(_generations.c.subnets)
            .where(_generations.c.study == self._id)
            .order_by(_generations.c.number)
        )
        with self.storage.transaction(write=False) as connection:
            texts = list(connection.scalars(query))
        return [[space.subnet(data) for data in json.loads(text)] for text in texts]

    def add_generation(self, number: int, subnets: Sequence[Subnet]) -> list[Subnet]:
        """Commit a generation's proposals; return those stored if another process was first."""
        row = {
            "study": self._id,
            "number": number,
            "subnets": json.dumps([subnet.to_json() for subnet in subnets]),
        }
        try:
            with self.storage.transaction(write=True) as connection:
                connection.execute(_generations.insert().values(row))
        except sa.exc.IntegrityError:
            return self.generations(self.space)[number]
        return list(subnets)

    def evaluations(self, space: SearchSpace, *, start: int = 0) -> list[Evaluation]:
        """Return the evaluations from a number on, in order."""
        query = (
            sa.select(_evaluations.c.number, _evaluations.c.record)
            .where(_evaluations.c.study == self._id, _evaluations.c.number >= start)
            .order_by(_evaluations.c.number)
        )
        with self.storage.transaction(write=False) as connection:
            rows = connection.execute(query).all()
        return [
            Evaluation.from_json({**json.loads(r.record), "number": r.number}, space) for r in rows
        ]

    def add_evaluation(
        self, evaluation: Evaluation, fingerprints: Mapping[str, str] | None = None
    ) -> Evaluation:
        """Commit an evaluation, and its values under their fingerprints, in one transaction.

        Args:
            evaluation: The evaluation; its number is assigned here.
            fingerprints: By name of measure, for values that other studies may reuse.

        Returns:
            The evaluation with its number.

        Raises:
            TellError: The study has an evaluation of this subnet.
        """
        record = {k: v for k, v in evaluation.to_json().items() if k != "number"}
        row = {
            "study": self._id,
            "key": evaluation.subnet.key,
            "record": json.dumps(record),
            "created": datetime.now(UTC).isoformat(),
        }
        highest = sa.select(sa.func.max(_evaluations.c.number)).where(
            _evaluations.c.study == self._id
        )
        for _ in range(_TRIES):
            try:
                with self.storage.transaction(write=True) as connection:
                    last = connection.scalar(highest)
                    number = 0 if last is None else last + 1
                    connection.execute(_evaluations.insert().values(number=number, **row))
                    for name, fingerprint in (fingerprints or {}).items():
                        if name in evaluation.values:
                            value = evaluation.values[name]
                            error = evaluation.errors.get(name, 0.0)
                            _keep(connection, fingerprint, evaluation.subnet, value, error)
            except sa.exc.IntegrityError as error:
                if self.has(evaluation.subnet):
                    msg = (
                        f"{evaluation.subnet} is in study {self.name!r} already. "
                        "A subnet is measured once."
                    )
                    raise TellError(msg) from error
                continue  # another process took the number; SQLite's write lock rules that out
            return replace(evaluation, number=number)
        msg = f"Study {self.name!r}: no free number in {_TRIES} tries. Too many writers at once?"
        raise StorageError(msg)

    def forget(self, *, whole: bool = False) -> None:
        """Delete the evaluations, so that proposals are asked again; or the whole study."""
        with self.storage.transaction(write=True) as connection:
            connection.execute(_evaluations.delete().where(_evaluations.c.study == self._id))
            if whole:
                connection.execute(_generations.delete().where(_generations.c.study == self._id))
                connection.execute(_studies.delete().where(_studies.c.id == self._id))

    def has(self, subnet: Subnet | None = None) -> bool:
        """Return whether it has an evaluation, of this subnet or of any."""
        query = sa.select(_evaluations.c.number).where(_evaluations.c.study == self._id).limit(1)
        query = query if subnet is None else query.where(_evaluations.c.key == subnet.key)
        with self.storage.transaction(write=False) as connection:
            return connection.scalar(query) is not None


def _keep(
    connection: sa.Connection, fingerprint: str, subnet: Subnet, value: float, error: float
) -> None:
    """Insert a value under a fingerprint, unless there is one."""
    key = {"fingerprint": fingerprint, "key": subnet.key}
    if connection.scalar(sa.select(_values.c.value).filter_by(**key)) is None:
        connection.execute(_values.insert().values(value=value, error=error, **key))
