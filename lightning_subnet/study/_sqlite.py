# SPDX-License-Identifier: Apache-2.0
"""Connections to SQLite, set up so that several processes may write one file."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

WAIT = 120.0  # seconds to wait for another process's lock


def configure(connection: Any, table: str) -> None:
    """Set up a new connection: write-ahead log, foreign keys, transactions begun by `begin`.

    Args:
        connection: A new connection of the driver.
        table: A database that has tables, but not this one, is of something else, and its file
            is left as it is.
    """
    connection.isolation_level = None  # transactions are begun by `begin`, not by the driver
    cursor = connection.cursor()
    tables = {row[0] for row in cursor.execute("SELECT name FROM sqlite_master")}
    if not tables or table in tables:
        _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Turn the write-ahead log on: a killed process leaves whole rows.

    Two connections that turn it on at once would wait for each other; SQLite ends that by failing
    one of them without waiting, whatever the timeout, so it tries again.
    """
    deadline = time.monotonic() + WAIT
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def begin(connection: Any) -> None:
    """Begin a transaction; one that writes takes the lock at once.

    Two that asked for it later would fail, not wait.

    Args:
        connection: SQLAlchemy's; it writes if its execution option `subnet_write` is true.
    """
    write = connection.get_execution_options().get("subnet_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
