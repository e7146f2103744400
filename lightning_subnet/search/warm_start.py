# SPDX-License-Identifier: Apache-2.0
"""Warm starts: what a search measures first, taken from subnets, results and finished studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._types import Floats
from lightning_subnet.errors import (
    InvalidSubnetError,
    ObjectiveError,
    SearchError,
    WarmStartWarning,
)
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.search.verify_front import stored_verified
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.objectives import Constraint, parse_objectives
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.study.storage import Storage, Study

_PART = 5  # a front takes up to this part of the budget
_PAIR = 2
_SHOWN = 5  # choices and values of each, in a message


@dataclass(frozen=True)
class StudySource:
    """A study by name, whose front starts another search."""

    storage: Storage
    name: str

    def found(self) -> SearchRecord:
        """Return what the study has found so far.

        Raises:
            SearchError: There is no such study.
        """
        study = self.storage.find_study(self.name)
        if study is None:
            names = self.storage.study_names()
            msg = (
                f"warm_start={self.name!r}: there is no such study in {self.storage.url!r}."
                f"{did_you_mean(self.name, names)} It holds: {listed(names)}."
            )
            raise SearchError(msg)
        return _read(study)


def _read(study: Study) -> SearchRecord:
    objectives = parse_objectives(study.header["objectives"])
    constraints = tuple(Constraint(**c) for c in study.header["constraints"])
    problem = Problem(study.space, objectives, constraints)
    history = History(problem.space, study.evaluations(problem.space))
    return SearchRecord(problem, history, verified=stored_verified(study, problem.names))


class WarmStart:
    """What a search measures first.

    Args:
        given: Subnets or their values, which are measured as listed; evaluations, as of a history
            or a front; results of searches; names of studies in `storage`, or pairs (URL, name) of
            studies elsewhere. One of them, or several.
        storage: Where names are looked up.

    Raises:
        SearchError: Something else was given.

    Example:
        >>> from lightning_subnet.study.storage import Storage
        >>> space = SearchSpace(depth=[1, 2, 3], width=[8, 16])
        >>> start = WarmStart([space.largest, {"depth": 1, "width": 8}], Storage(None))
        >>> start.subnets(space, most=10)
        [Subnet(depth=3, width=16), Subnet(depth=1, width=8)]
    """

    def __init__(self, given: Any, storage: Storage) -> None:
        single = isinstance(given, (str, Mapping, Evaluation, SearchRecord)) or _is_pair(given)
        if not single and not isinstance(given, Iterable):
            self._refuse(given)
        self._items = [_item(item, storage) for item in ([given] if single else given)]
        if strange := [item for item in self._items if not isinstance(item, _KINDS)]:
            self._refuse(strange[0])

    @staticmethod
    def of(given: Any, storage: Storage) -> WarmStart:
        """Return what was given as a warm start; one that was made before stays as it is."""
        return given if isinstance(given, WarmStart) else WarmStart(given, storage)

    @staticmethod
    def _refuse(given: Any) -> None:
        msg = (
            f"warm_start= holds {given!r:.60}, which names no subnets. Give subnets, the result of "
            "a search, the name of a study in this storage, or a pair (URL, name)."
        )
        raise SearchError(msg)

    @property
    def names(self) -> list[str]:
        """The names of the searches whose fronts are taken: what may grow until a resume."""
        sources = (item for item in self._items if not isinstance(item, (Mapping, Evaluation)))
        return [str(getattr(source, "name", "")) for source in sources]

    def check(self) -> None:
        """Raise `SearchError` if a study to start from is not there."""
        for item in self._items:
            if isinstance(item, StudySource):
                item.found()

    def stored(self, study: Study | None, space: SearchSpace) -> list[Subnet] | None:
        """Return what a study measured first, if it was made with these sources.

        They may have grown since, or be gone: a study goes on with what it started from.
        """
        if study is None or not self.names or study.header.get("warm_from") != self.names:
            return None
        try:
            return [space.subnet(data) for data in study.header["warm_start"]]
        except InvalidSubnetError:  # another space than the study's, which its header tells
            return []

    def subnets(self, space: SearchSpace, *, most: int) -> list[Subnet]:
        """Return the subnets to measure first, each once.

        Of a result or a study it is the front, thinned by crowding distance to `most` (of several
        sources together). Subnets of another space are projected: a choice takes the value that the
        subnet has for it, or the largest where it has none that fits; in a part of a space the
        nearest member is taken. Subnets that were given as such must be subnets of the space.

        Args:
            space: The space of the search.
            most: How many at most are taken from fronts.

        Raises:
            SearchError: A source is not there or has no front, or nothing of a subnet fits.
            InvalidSubnetError: A given subnet is none of the space.
        """
        most = max(most // max(len(self.names), 1), 1)
        found: list[Subnet] = []
        for item in self._items:
            if isinstance(item, Mapping):
                found.append(space.subnet(item))
            elif isinstance(item, Evaluation):
                found += projected(space, [item.subnet])
            else:
                source = item.found() if isinstance(item, StudySource) else item
                name = str(getattr(item, "name", "")) or "the result"
                found += projected(space, thinned_front(source, most, name=name))
        return list(dict.fromkeys(found))


_KINDS = (Mapping, Evaluation, SearchRecord, StudySource)


def _is_pair(given: Any) -> bool:
    """Return whether this is a pair (URL, name)."""
    return (
        isinstance(given, tuple)
        and len(given) == _PAIR
        and all(isinstance(part, str) for part in given)
        and "://" in given[0]
    )


def _item(item: Any, storage: Storage) -> Any:
    if isinstance(item, str):
        return StudySource(storage, item)
    if _is_pair(item):
        return StudySource(type(storage)(item[0]), item[1])
    return item


def most_of(budget: int | None, batch_size: int) -> int:
    """Return how many subnets of fronts a search starts from: a fifth of its budget.

    Args:
        budget: Evaluations; None where only time is limited.
        batch_size: Of the strategy, which is the number then.
    """
    return batch_size if budget is None else max(budget // _PART, 2)


def thinned_front(source: SearchRecord, most: int, *, name: str) -> list[Subnet]:
    """Return the front of what was searched, without the most crowded if it is longer than `most`.

    Raises:
        SearchError: There is no front.
    """
    problem, history = source.problem, source.final
    try:
        front = problem.front(history)
    except ObjectiveError:  # relative bounds, whose reference is not known here
        absolute = tuple(c for c in problem.constraints if not c.relative)
        problem = Problem(problem.space, problem.objectives, absolute, problem.exact)
        front = problem.front(history)
    if not front:
        msg = (
            f"warm_start={name!r:.60} has no front: {len(history)} evaluations, none of them "
            "feasible. Finish that search first, or leave it out."
        )
        raise SearchError(msg)
    # The front alone may lack the largest subnet, to which bounds refer; all of it is feasible.
    objectives = Problem(problem.space, problem.objectives)
    F = objectives.scores(History(history.space, front))[0]
    return [front[i].subnet for i in uncrowded(F, most)]


def uncrowded(F: Floats, most: int) -> list[int]:
    """Return the rows that are left when the most crowded are taken away one by one.

    Args:
        F: Points (n, m) of a front.
        most: How many are left at most; the extremes of the first objective go last.

    Returns:
        Row numbers, in order.

    Example:
        >>> uncrowded(np.array([[0.0, 4], [1, 2], [1.1, 1.9], [3, 0]]), 3)
        [0, 2, 3]

    References:
        Deb et al., NSGA-II, IEEE TEC 6(2), 2002, section III-B, the crowding distance.
    """
    from lightning_subnet.strategies._toolkit._pymoo import crowding

    left = list(range(len(F)))
    while len(left) > most:
        # Of equally crowded ones the last goes.
        left.pop(len(left) - 1 - int(np.argmin(crowding(F[left])[::-1])))
    return left


def projected(space: SearchSpace, subnets: Sequence[Subnet]) -> list[Subnet]:
    """Return subnets of another space as subnets of this one; see `WarmStart.subnets`.

    Raises:
        SearchError: Nothing of any subnet fits.

    Example:
        >>> old = SearchSpace(depth=[1, 2], width=[8, 16], stem=["a", "b"])
        >>> new = SearchSpace(depth=[1, 2, 3], width=[8, 16, 32], heads=[4, 8])
        >>> projected(new, [old.smallest])
        [Subnet(depth=1, width=8, heads=8)]
    """
    choices = space.choices
    rows, strange = [], []
    for subnet in subnets:
        if subnet in space:
            rows.append(space.indices([subnet])[0])
            continue
        row = [len(c.values) - 1 if c.ordered else 0 for c in choices.values()]
        active = subnet.active
        fits = {n: v for n, v in active.items() if n in choices and v in choices[n].values}
        if not fits:
            strange.append(subnet)
            continue
        for name, value in fits.items():
            row[space.names.index(name)] = choices[name].values.index(value)
        rows.append(np.array(row))
    if strange and not rows:
        values = {name: choice.values[:_SHOWN] for name, choice in list(choices.items())[:_SHOWN]}
        more = " ..." if len(choices) > _SHOWN else ""
        msg = (
            f"warm_start= cannot begin here: {strange[0]!r:.120} shares no choice and value with "
            f"this space, whose choices are {str(values)[1:-1]:.200}{more}."
        )
        raise SearchError(msg)
    if strange:
        warn(
            f"warm_start= leaves out {len(strange)} of {len(subnets)} subnets, which share no "
            f"choice and value with this space: {strange[0]!r:.120}.",
            WarmStartWarning,
        )
    if not rows:
        return []
    X = space.nearest(space.canonical(np.stack(rows)), set())
    return list(dict.fromkeys(space.from_indices(X)))
