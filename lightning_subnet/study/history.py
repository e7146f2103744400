# SPDX-License-Identifier: Apache-2.0
"""Evaluations, each a subnet with its measured values, and histories of them, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from lightning_subnet._types import Indices
from lightning_subnet.errors import TellError
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["ok", "failed"]
Verified = Mapping[str, Mapping[str, tuple[float, float]]]
"""Second (value, standard error) by name of measure, by key of the subnet."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A subnet with its measured values.

    Args:
        number: Its place in the history, from 0.
        subnet: The subnet.
        values: Values by name of measure; of a failed evaluation those that did not fail.
        errors: Standard errors by name of measure, where a measure gave one.
        status: `"ok"` or `"failed"`.
        reason: Why it failed.
        seconds: How long the measurement took; reused values take no time.
        generation: The generation that proposed it; None if it was attached by the user.
        reused: Names of the measures whose values came from another study.
    """

    number: int
    subnet: Subnet
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""
    seconds: float = 0.0
    generation: int | None = None
    reused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("values", "errors"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts of copies and pickles; a read-only view cannot be pickled."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"values": dict(self.values), "errors": dict(self.errors)}
        return Evaluation, tuple(plain.values())

    @property
    def ok(self) -> bool:
        """Whether the measurement succeeded."""
        return self.status == "ok"

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.6g}" for name, value in self.values.items())
        outcome = values if self.ok else f"failed: {self.reason}"
        return f"<Evaluation {self.number}: {outcome} | {self.subnet!r}>"

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON-able data."""
        return {
            "number": self.number,
            "subnet": self.subnet.to_json(),
            "values": dict(self.values),
            "errors": dict(self.errors),
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "generation": self.generation,
            "reused": list(self.reused),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], space: SearchSpace) -> Evaluation:
        """Return the evaluation that `to_json` described."""
        return cls(
            **{**data, "subnet": space.subnet(data["subnet"]), "reused": tuple(data["reused"])}
        )


class History(Sequence[Evaluation]):
    """Evaluations of one space in order, without duplicates.

    Args:
        space: The space of the subnets.
        evaluations: The evaluations to begin with.

    Example:
        >>> from lightning_subnet import SearchSpace
        >>> space = SearchSpace(depth=[1, 2, 3])
        >>> history = History(space)
        >>> history.add(Evaluation(0, space.subnet(depth=2), {"error": 0.5}))
        >>> space.subnet(depth=2) in history, history.column("error").tolist()
        (True, [0.5])
    """

    def __init__(self, space: SearchSpace, evaluations: Iterable[Evaluation] = ()) -> None:
        self.space = space
        self._evaluations: list[Evaluation] = []
        self._codes: dict[bytes, int] = {}
        self._rows: list[Indices] = []
        for evaluation in evaluations:
            self.add(evaluation)

    def add(self, evaluation: Evaluation) -> None:
        """Append an evaluation.

        Raises:
            TellError: The subnet is in the history already.
        """
        row = self.space.indices([evaluation.subnet])
        code = row_codes(row)[0]
        if code in self._codes:
            msg = (
                f"{evaluation.subnet} is evaluation {self._codes[code]} of the history already. "
                "A subnet is measured once; ask `subnet in history` first."
            )
            raise TellError(msg)
        self._codes[code] = len(self._evaluations)
        self._rows.append(row)
        self._evaluations.append(evaluation)

    @property
    def codes(self) -> set[bytes]:
        """The subnets as `row_codes`, for quick tests of whether one is in the history."""
        return set(self._codes)

    @property
    def indices(self) -> Indices:
        """Value indices of all evaluations, (n, n_choices)."""
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0] if self._rows else np.zeros((0, len(self.space.names)), dtype=np.int64)

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """A mask (n,) of the evaluations that succeeded."""
        return np.array([evaluation.ok for evaluation in self._evaluations], dtype=bool)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Return the values of a measure (n,), NaN where an evaluation failed or has none."""
        return np.array(
            [e.values.get(name, np.nan) if e.ok else np.nan for e in self._evaluations], dtype=float
        )

    def get(self, subnet: Subnet) -> Evaluation | None:
        """Return the evaluation of a subnet, or None."""
        at = self._codes.get(row_codes(self.space.indices([subnet]))[0])
        return None if at is None else self._evaluations[at]

    def __contains__(self, item: object) -> bool:
        if isinstance(item, Subnet):
            return item in self.space and self.get(item) is not None
        return item in self._evaluations

    @overload
    def __getitem__(self, at: int) -> Evaluation: ...
    @overload
    def __getitem__(self, at: slice) -> History: ...
    def __getitem__(self, at: int | slice) -> Evaluation | History:
        if isinstance(at, slice):
            return History(self.space, self._evaluations[at])
        return self._evaluations[at]

    def __len__(self) -> int:
        return len(self._evaluations)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self._evaluations)

    def __repr__(self) -> str:
        failed = int((~self.ok).sum())
        return f"<History of {len(self)} evaluations, {failed} failed>"

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per evaluation, indexed by its number.

        The columns are the choices (NA where one does not exist), the measures, status, reason,
        seconds, generation and reused.
        """
        import pandas as pd

        measures = list(dict.fromkeys(name for e in self for name in e.values))
        rows = []
        for e in self:
            active = e.subnet.active
            rows.append(
                {name: active.get(name, pd.NA) for name in self.space.names}
                | {name: e.values.get(name, np.nan) for name in measures}
                | {"status": e.status, "reason": e.reason, "seconds": e.seconds}
                | {"generation": e.generation, "reused": ",".join(e.reused)}
            )
        facts = ["status", "reason", "seconds", "generation", "reused"]
        columns = [*self.space.names, *measures, *facts]
        index = pd.Index([e.number for e in self], name="number", dtype="int64")
        frame = pd.DataFrame(rows, columns=columns, index=index)
        return frame.astype({"generation": "Int64"})


def with_verified(history: History, verified: Verified) -> History:
    """Return the evaluations with their second values in place of the first."""
    return History(
        history.space,
        (
            _with_values(evaluation, verified[evaluation.subnet.key])
            if evaluation.subnet.key in verified and evaluation.ok
            else evaluation
            for evaluation in history
        ),
    )


def _with_values(evaluation: Evaluation, pairs: Mapping[str, tuple[float, float]]) -> Evaluation:
    """Return the evaluation with other values, (value, standard error) by name of measure."""
    return replace(
        evaluation,
        values={**evaluation.values, **{name: value for name, (value, _) in pairs.items()}},
        errors={**evaluation.errors, **{name: error for name, (_, error) in pairs.items()}},
    )
