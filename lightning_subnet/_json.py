# SPDX-License-Identifier: Apache-2.0
"""JSON: files of a form, a stable hash, and the differences of two values in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_subnet.errors import StorageError, SubnetError


def digest(data: object) -> str:
    """Return a short hash of JSON-able data, the same in every process.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON-able data to a file."""
    Path(path).write_text(json.dumps(data, indent=1), encoding="utf-8")


def read(
    path: str | Path,
    form: str,
    what: str,
    *,
    error: type[SubnetError] = StorageError,
    hint: str | None = None,
) -> dict[str, Any]:
    """Return the data of a JSON file of a form.

    Args:
        path: The file.
        form: The text under `format` in it.
        what: The class that writes such files, for the message.
        error: The class that is raised.
        hint: A sentence on what to do; None: write one with the method `save` of the class.

    Raises:
        SubnetError: Of the class `error`: the file cannot be read, or is of another form.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != form:
            raise KeyError(data["format"])
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise error(_not_of_form(path, what, reason, hint)) from reason
    return data


def unreadable(path: str | Path, what: str, error: Exception) -> StorageError:
    """Return the error of a file of the form whose data is not what it should be."""
    return StorageError(_not_of_form(path, what, error))


def _not_of_form(path: str | Path, what: str, reason: Exception, hint: str | None = None) -> str:
    hint = hint or f"Write one with {what}.save(path)."
    return f"{path} holds no {what} ({reason!r:.80}). {hint}"


def differences(stored: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield one line per place where two JSON values differ.

    Args:
        stored: A value that was stored.
        now: The value to compare it with.
        path: The place of both in a larger value.

    Example:
        >>> list(differences({"seed": 0, "sizes": [1, 2]}, {"seed": 1, "sizes": [1, 3]}))
        ['seed: stored 0, now 1', 'sizes[1]: stored 2, now 3']
    """
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in {**stored, **now}:
            where = f"{path}.{key}" if path else key
            if key not in stored:
                yield f"{where}: stored nothing, now {_short(now[key])}"
            elif key not in now:
                yield f"{where}: stored {_short(stored[key])}, now nothing"
            else:
                yield from differences(stored[key], now[key], where)
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for i, (one, other) in enumerate(zip(stored, now, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif stored != now:
        yield f"{path}: stored {_short(stored)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004 - a line's worth
