# SPDX-License-Identifier: Apache-2.0
"""Where two JSON values differ, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


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
