# SPDX-License-Identifier: Apache-2.0
"""Warm starts: the first subnets of a search, from subnets, results and finished studies."""

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

_PART = 5  # a front takes up to a fifth of the budget
_PAIR = 2
_SHOWN = 5  # choices and values of each, in a message


@dataclass(frozen=True)
class StudySource:
    """A study by name, whose front starts another search."""

    storage: Storage
    name: str

    def record(self) -> SearchRecord:
        """Return the measurements of the study so far.

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
    """The subnets that a search measures first, before its strategy is asked.

    Args:
        sources: Subnets or their values, which are measured as listed; evaluations, as of a history
            or a front; results of searches; names of studies in `storage`, or pairs (URL, name) of
            studies elsewhere. One of them, or several.
        storage: The storage in which names are looked up.

    Raises:
        SearchError: A source is not one of these.

    Example:
        >>> from lightning_subnet.study.storage import Storage
        >>> space = SearchSpace(depth=[1, 2, 3], width=[8, 16])
        >>> start = WarmStart([space.largest, {"depth": 1, "width": 8}], Storage(None))
        >>> start.subnets(space, most=10)
        [Subnet(depth=3, width=16), Subnet(depth=1, width=8)]
    """

    def __init__(self, sources: Any, storage: Storage) -> None:
        single = isinstance(sources, (str, Mapping, Evaluation, SearchRecord)) or _is_pair(sources)
        if not single and not isinstance(sources, Iterable):
            self._refuse(sources)
        self._sources = [_source(item, storage) for item in ([sources] if single else sources)]
        if others := [source for source in self._sources if not isinstance(source, _KINDS)]:
            self._refuse(others[0])

    @staticmethod
    def of(sources: Any, storage: Storage) -> WarmStart:
        """Return a `WarmStart` as it is, and anything else as one."""
        return sources if isinstance(sources, WarmStart) else WarmStart(sources, storage)

    @staticmethod
    def _refuse(source: Any) -> None:
        msg = (
            f"warm_start= holds {source!r:.60}, which names no subnets. Give subnets, the result "
            "of a search, the name of a study in this storage, or a pair (URL, name)."
        )
        raise SearchError(msg)

    @property
    def names(self) -> list[str]:
        """The names of the searches whose fronts are taken, which may grow until a resume."""
        listed_alone = (Mapping, Evaluation)
        searches = (source for source in self._sources if not isinstance(source, listed_alone))
        return [str(getattr(search, "name", "")) for search in searches]

    def check(self) -> None:
        """Raise `SearchError` if a study to start from is not there."""
        for source in self._sources:
            if isinstance(source, StudySource):
                source.record()

    def stored(self, study: Study | None, space: SearchSpace) -> list[Subnet] | None:
        """Return the first subnets of a study, or None if it was made with other sources.

        The sources may have grown since, or be gone: a study goes on with what it started from.
        """
        if study is None or not self.names or study.header.get("warm_from") != self.names:
            return None
        try:
            return [space.subnet(data) for data in study.header["warm_start"]]
        except InvalidSubnetError:  # the space is not the study's, as the check of its header says
            return []

    def subnets(self, space: SearchSpace, *, most: int) -> list[Subnet]:
        """Return the subnets to measure first, each once.

        Of a result or a study it is the front, thinned by crowding distance to `most` (of several
        sources together). Subnets of another space are projected: a choice takes the value that the
        subnet has for it, or the largest where it has none that fits; in a part of a space the
        nearest member is taken. Sources that are subnets themselves must be of the space.

        Args:
            space: The space of the search.
            most: The largest number of subnets that are taken from fronts.

        Raises:
            SearchError: A source is not there or has no front, or nothing of a subnet fits.
            InvalidSubnetError: A source is a subnet of another space.
        """
        most = max(most // max(len(self.names), 1), 1)
        subnets: list[Subnet] = []
        for source in self._sources:
            if isinstance(source, Mapping):
                subnets.append(space.subnet(source))
            elif isinstance(source, Evaluation):
                subnets += projected(space, [source.subnet])
            else:
                record = source.record() if isinstance(source, StudySource) else source
                name = str(getattr(source, "name", "")) or "the result"
                subnets += projected(space, thinned_front(record, most, name=name))
        return list(dict.fromkeys(subnets))


_KINDS = (Mapping, Evaluation, SearchRecord, StudySource)


def _is_pair(item: Any) -> bool:
    """Return whether this is a pair (URL, name)."""
    return (
        isinstance(item, tuple)
        and len(item) == _PAIR
        and all(isinstance(part, str) for part in item)
        and "://" in item[0]
    )


def _source(item: Any, storage: Storage) -> Any:
    """Return an item with names of studies as what they stand for."""
    if isinstance(item, str):
        return StudySource(storage, item)
    if _is_pair(item):
        return StudySource(type(storage)(item[0]), item[1])
    return item


def most_of(budget: int | None, batch_size: int) -> int:
    """Return the largest number of subnets of fronts that start a search: a fifth of its budget.

    Args:
        budget: Evaluations; None where only time is limited.
        batch_size: The batch size of the strategy, which is the number then.
    """
    return batch_size if budget is None else max(budget // _PART, 2)


def thinned_front(record: SearchRecord, most: int, *, name: str) -> list[Subnet]:
    """Return the front of a search, without its most crowded subnets if it is longer than `most`.

    Args:
        record: The search.
        most: The largest number of subnets to return.
        name: The name of the search, for the message.

    Raises:
        SearchError: There is no front.
    """
    problem, history = record.problem, record.final
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
        most: The largest number that is left; the extremes of the first objective go last.

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
    rows, others = [], []
    for subnet in subnets:
        if subnet in space:
            rows.append(space.indices([subnet])[0])
            continue
        row = [len(c.values) - 1 if c.ordered else 0 for c in choices.values()]
        active = subnet.active
        fits = {n: v for n, v in active.items() if n in choices and v in choices[n].values}
        if not fits:
            others.append(subnet)
            continue
        for name, value in fits.items():
            row[space.names.index(name)] = choices[name].values.index(value)
        rows.append(np.array(row))
    if others and not rows:
        values = {name: choice.values[:_SHOWN] for name, choice in list(choices.items())[:_SHOWN]}
        more = " ..." if len(choices) > _SHOWN else ""
        msg = (
            f"warm_start= cannot begin here: {others[0]!r:.120} shares no choice and value with "
            f"this space, whose choices are {str(values)[1:-1]:.200}{more}."
        )
        raise SearchError(msg)
    if others:
        warn(
            f"warm_start= leaves out {len(others)} of {len(subnets)} subnets, which share no "
            f"choice and value with this space: {others[0]!r:.120}.",
            WarmStartWarning,
        )
    if not rows:
        return []
    X = space.nearest(space.canonical(np.stack(rows)), set())
    return list(dict.fromkeys(space.from_indices(X)))
