# SPDX-License-Identifier: Apache-2.0
"""Reasons: why torch.export cannot follow a network, in words of the network's own code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

_TORCH = str(Path(torch.__file__).parent)
_LIBRARY = sysconfig.get_path("stdlib")
_HERE = str(Path(__file__).parent)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)  # that are open
_PLAIN = (torch.Tensor, int, float, bool, str, type(None), *_SIZES)

_KINDS = (
    (
        r"data-dependent|DataDependent|DynamicOutputShape|dynamic_output_shape|_local_scalar_dense",
        "goes by the values of a tensor, which differ from one input to the next",
        "Decide by sizes or attributes there, or compute both and write "
        "torch.where(condition, one, other)",
    ),
    (
        r"data is not allocated yet|data pointer|data_ptr|\.numpy\(\)|tolist|\.storage\(\)",
        "reads the memory of a tensor, which there is none of while a network is followed",
        "Take sizes from x.shape there, and compute with operators of torch",
    ),
)


def reason(error: BaseException) -> str:
    """Return why torch.export failed: the line of the user's code, what it does, what to write.

    Args:
        error: What torch.export raised.

    Example:
        >>> reason(ValueError("no such    thing"))
        'torch.export cannot follow it: no such thing'
    """
    line = _line(error)
    texts = [f"{type(each).__name__}: {each}" for each in _chain(error)]
    for pattern, what, advice in _KINDS:
        if any(re.search(pattern, text) for text in texts):
            return f"torch.export cannot follow it: {line or 'its forward()'} {what}. {advice}"
    fails = f"{line} fails while it is followed: " if line else ""
    return f"torch.export cannot follow it: {fails}{brief(error)}"


def foreign(leaves: Iterable[Any]) -> str | None:
    """Return why an output cannot be had of operators, or None.

    Args:
        leaves: Of the output.

    Example:
        >>> foreign([torch.zeros(1), 2, None]) is None
        True
        >>> foreign([1j])
        "torch.export cannot follow it: its forward() returns a 'complex'. Let it return tensors, \
or tuples, lists, dicts or dataclasses of them"
    """
    names = (type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _PLAIN))
    name = next(names, None)
    if name is None:
        return None
    return (
        f"torch.export cannot follow it: its forward() returns a {name!r}. Let it return tensors, "
        "or tuples, lists, dicts or dataclasses of them"
    )


def brief(error: BaseException) -> str:
    """Return the text of an error as the start of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    """Return the last line of code outside of torch that ran in a forward pass; none: empty."""
    for each in _chain(error):
        frames = traceback.extract_tb(each.__traceback__)
        inside = [i for i, f in enumerate(frames) if f.filename.startswith(_HERE)]
        own = [f for f in frames[max(inside, default=-1) + 1 :] if not _is_library(f.filename)]
        if own:
            *_, last = own
            place = f"{'/'.join(Path(last.filename).parts[-3:])}, line {last.lineno}"
            line = (last.line or "").partition("  #")[0]
            return f"`{line:.100}` ({place})" if line else f"{last.name}() ({place})"
    return ""


def _is_library(file: str) -> bool:
    of_python = file.startswith((_LIBRARY, "<frozen")) and "site-packages" not in file
    return of_python or file.startswith(_TORCH)
