# SPDX-License-Identifier: Apache-2.0
"""Where two JSON values differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_subnet.errors import StorageError, SubnetError


def differences(stored: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield one line per place where two JSON values differ."""
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


def digest(data: object) -> str:
    """Return a short stable hash of JSON-able data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON."""
    Path(path).write_text(json.dumps(data, indent=1), encoding="utf-8")


def read(
    path: str | Path,
    form: str,
    what: str,
    *,
    error: type[SubnetError] = StorageError,
    hint: str | None = None,
) -> dict[str, Any]:
    """Return JSON of a form.

    Args:
        path: The file.
        form: The text under `format`.
        what: The class that writes it, for the message.
        error: The class that is raised.
        hint: What to do instead: a sentence; None: write one with the method `save` of the class.

    Raises:
        SubnetError: Of the class `error`: not such a file.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != form:
            raise KeyError(data["format"])
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise error(_not_of_form(path, what, reason, hint)) from reason
    return data


def unreadable(path: str | Path, what: str, error: Exception) -> StorageError:
    """Return the error of a file that holds something else."""
    return StorageError(_not_of_form(path, what, error))


def _not_of_form(path: str | Path, what: str, reason: Exception, hint: str | None = None) -> str:
    hint = hint or f"Write one with {what}.save(path)."
    return f"{path} holds no {what} ({reason!r:.80}). {hint}"
