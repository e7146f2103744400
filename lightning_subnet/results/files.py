# SPDX-License-Identifier: Apache-2.0
"""Results as JSON files: everything but the code of the measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_subnet.errors import StorageError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.objectives import Constraint, Objective
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.results.result import SearchResult

_FORMAT = "lightning-subnet result 1"


def write_result(result: SearchResult, path: Path) -> None:
    """Write a result; see `SearchResult.save`."""
    data = {
        "format": _FORMAT,
        "name": result.name,
        "space": result.history.space.to_json(),
        "objectives": {o.name: o.direction for o in result.objectives},
        "constraints": [c.to_json() for c in _stored_constraints(result.problem)],
        "measures": result.measures,
        "evaluations": [evaluation.to_json() for evaluation in result.history],
        "verified": result.verified,
    }
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _stored_constraints(problem: Problem) -> tuple[Constraint, ...]:
    """Return the constraints with absolute bounds where an exact measure gave the reference."""
    exact = problem.exact_constraints
    return exact + tuple(c for c in problem.constraints if c.name not in problem.exact)


def read_result(path: Path) -> dict[str, Any]:
    """Return the arguments of the result that a file holds.

    Raises:
        StorageError: Not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise KeyError(data["format"])
        space = SearchSpace.from_json(data["space"])
        objectives = tuple(Objective(name, d) for name, d in data["objectives"].items())
        constraints = tuple(Constraint(**c) for c in data["constraints"])
        history = History(space, (Evaluation.from_json(e, space) for e in data["evaluations"]))
        verified = {
            key: {name: (float(value), float(error)) for name, (value, error) in pairs.items()}
            for key, pairs in data.get("verified", {}).items()
        }
        measures = {name: dict(told) for name, told in data.get("measures", {}).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} holds no search result ({error!r:.80}). Write one with result.save(path)."
        raise StorageError(msg) from error
    return {
        "problem": Problem(space, objectives, constraints),
        "history": history,
        "name": data["name"],
        "verified": verified,
        "measures": measures,
    }
