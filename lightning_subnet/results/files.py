# SPDX-License-Identifier: Apache-2.0
"""Records as JSON files: everything but the code of the measures."""

from __future__ import annotations

from pathlib import Path

from lightning_subnet import _json
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.objectives import Constraint, Objective
from lightning_subnet.study.problem import Problem

_FORMAT = "lightning-subnet result 1"
_WRITER = "SearchResult"


def write_record(record: SearchRecord, path: Path) -> None:
    """Write a record; see `SearchResult.save`."""
    data = {
        "format": _FORMAT,
        "name": record.name,
        "space": record.history.space.to_json(),
        "objectives": {o.name: o.direction for o in record.objectives},
        "constraints": [c.to_json() for c in _stored_constraints(record.problem)],
        "measures": record.measures,
        "evaluations": [evaluation.to_json() for evaluation in record.history],
        "verified": record.verified,
    }
    _json.write(path, data)


def _stored_constraints(problem: Problem) -> tuple[Constraint, ...]:
    """Return the constraints with absolute bounds where an exact measure gave the reference."""
    exact = problem.exact_constraints
    return exact + tuple(c for c in problem.constraints if c.name not in problem.exact)


def read_record(path: Path) -> SearchRecord:
    """Return the record that a file holds; its measures are names without code.

    Raises:
        StorageError: The file does not hold one.
    """
    data = _json.read(path, _FORMAT, _WRITER)
    try:
        space = SearchSpace.from_json(data["space"])
        objectives = tuple(Objective(name, d) for name, d in data["objectives"].items())
        constraints = tuple(Constraint(**c) for c in data["constraints"])
        return SearchRecord(
            Problem(space, objectives, constraints),
            History(space, (Evaluation.from_json(e, space) for e in data["evaluations"])),
            name=data["name"],
            verified={
                key: {name: (float(value), float(error)) for name, (value, error) in pairs.items()}
                for key, pairs in data.get("verified", {}).items()
            },
            measures=data.get("measures", {}),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _json.unreadable(path, _WRITER, error) from error
