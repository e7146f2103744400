# SPDX-License-Identifier: Apache-2.0
"""Progressive shrinking: the choices that are open in each phase of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import SearchError, SpaceError
from lightning_subnet.space.choices import Value
from lightning_subnet.space.space import SearchSpace

Unit = Literal["epochs", "steps"]
_UNITS = ("epochs", "steps")
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Phase:
    """A part of the training in which the same values are open.

    Args:
        number: 0 is the warm-up, in which nothing is open yet; the others count from 1.
        start: Its first epoch or step.
        opens: The patterns of the choices that open in it; none in the warm-up.
        part: Which part of their opening this is, from 1.
        parts: Of how many.
        sorts: Whether it begins with a sorting of channels.
    """

    number: int
    start: int
    opens: tuple[str, ...] = ()
    part: int = 1
    parts: int = 1
    sorts: bool = False


class ProgressiveShrinking:
    """A schedule for `SubnetSampling`: choices open one kind after the other, largest values first.

    What is not open yet is held at its value in the largest subnet; what is open stays so. The
    smallest subnet of the sandwich is that of what is open. The last phase lasts until the training
    ends, whatever its length. The phase is a function of the epoch or the step alone, so a training
    that is resumed from any checkpoint goes on in the phase, and with the subnets, that it would
    have had. `SubnetSampling` logs its number as `shrinking_phase`, in the progress bar too.

    Args:
        phases: Lengths by pattern, in the order of opening. A pattern is that of `fnmatch` over the
            names of choices (`"ks.*"`), or a group's name (`"ks"`); several that open together are
            a tuple. A length opens all values at once; several open them in as many parts, so with
            `(1, 4)` a depth of {2, 3, 4} takes {3, 4} for 1 epoch and {2, 3, 4} for 4. A choice
            that several patterns match belongs to the first.
        unit: Lengths are in `"epochs"` or in (optimizer) `"steps"`.
        warmup: How long the largest subnet is trained alone at first.
        free: Patterns of choices that vary from the start, as the resolution does in the original.
        sort: Patterns of `phases` that begin with `sort_channels`, in each part: channels are
            sorted by importance before a width opens. Every subnet that was open stays the same
            function. Optimizer states are sorted with the weights, while averages of the weights
            that a callback keeps (EMA, SWA) are not: start them later.

    Raises:
        SearchError: There are no phases, or a length, a unit or a pattern is not valid.

    References:
        Cai et al., Once-for-All, ICLR 2020, section 3.3. Its authors' package has the phases:
        kernel sizes, then depths {3, 4} and {2, 3, 4}, then expansions {4, 6} and {3, 4, 6}.

    Example:
        >>> schedule = ProgressiveShrinking(
        ...     {"ks.*": 2, "d.*": (1, 2), "e.*": (1, 2)}, warmup=3, sort="e.*"
        ... )
        >>> [phase.start for phase in schedule.phases]
        [0, 3, 5, 6, 8, 9]
        >>> space = SearchSpace({"d.0": [2, 3, 4], "ks.0": [3, 5, 7], "e.0": [3, 4, 6]})
        >>> schedule.opened(space, schedule.phase(epoch=5)).values
        {'d.0': (3, 4), 'ks.0': (3, 5, 7), 'e.0': (6,)}
    """

    def __init__(
        self,
        phases: Mapping[str | tuple[str, ...], int | Sequence[int]],
        *,
        unit: Unit = "epochs",
        warmup: int = 0,
        free: Patterns = (),
        sort: Patterns = (),
    ) -> None:
        if not isinstance(phases, Mapping) or not phases:
            msg = (
                f"phases={phases!r:.60} has no phase. Give lengths by pattern, in the order of "
                'opening: ProgressiveShrinking({"ks.*": 2, "d.*": (1, 2)}).'
            )
            raise SearchError(msg)
        if unit not in _UNITS:
            msg = f"unit={unit!r} is unknown.{did_you_mean(unit, _UNITS)} It is one of {_UNITS}."
            raise SearchError(msg)
        self.unit: Unit = unit
        self.free = _patterns(free)
        self._opens = [_patterns(key) for key in phases]
        self._sorts = _patterns(sort)
        names = [pattern for patterns in self._opens for pattern in patterns]
        if unknown := [pattern for pattern in self._sorts if pattern not in names]:
            msg = (
                f"sort={unknown[0]!r} is not a pattern of the phases."
                f"{did_you_mean(unknown[0], names)} They are {listed(names)}."
            )
            raise SearchError(msg)
        self.phases = self._phases(phases, self._length("warmup", warmup, least=0))

    def _phases(self, lengths: Mapping[Any, Any], warmup: int) -> tuple[Phase, ...]:
        phases = [Phase(0, 0)] if warmup else []
        start = warmup
        for opens, (key, length) in zip(self._opens, lengths.items(), strict=True):
            name = f"phases[{key!r}]"
            parts = [*length] if isinstance(length, list | tuple) else [length]
            if not parts:
                msg = f"{name} is empty. Give a length, or several to open values in parts: (1, 4)."
                raise SearchError(msg)
            sorts = any(pattern in self._sorts for pattern in opens)
            for part, units in enumerate(parts, 1):
                number = phases[-1].number + 1 if phases else 1
                phases.append(Phase(number, start, opens, part, len(parts), sorts))
                start += self._length(name, units)
        return tuple(phases)

    def _length(self, name: str, length: object, *, least: int = 1) -> int:
        hint = f"It is a number of {self.unit}."
        return checked_int(length, name, error=SearchError, least=least, hint=hint)

    def phase(self, *, step: int = 0, epoch: int = 0) -> Phase:
        """Return the phase of an epoch, or of a step where lengths are in steps."""
        now = step if self.unit == "steps" else epoch
        return next(phase for phase in reversed(self.phases) if phase.start <= now)

    def before(self, phase: Phase) -> Phase:
        """Return the phase before, or before the first one a phase with nothing open."""
        at = self.phases.index(phase)
        return self.phases[at - 1] if at else Phase(0, 0)

    def begins(self, phase: Phase, *, step: int, epoch: int, batch_idx: int) -> bool:
        """Return whether this batch is the first of a phase."""
        if self.unit == "steps":
            return step == phase.start
        return epoch == phase.start and batch_idx == 0

    @property
    def sorts(self) -> bool:
        """Whether some phase begins with a sorting of channels."""
        return any(phase.sorts for phase in self.phases)

    def check(self, space: SearchSpace) -> None:
        """Refuse a space that the patterns do not fit.

        Raises:
            SearchError: A pattern matches no choice, or only choices of an earlier one; or there is
                a choice that nothing opens.
        """
        names = {name: _group(name) for name in space.names}
        near = dict.fromkeys(f"{group}.*" if group else name for name, group in names.items())
        unopened = dict(names)
        for patterns in [self.free, *self._opens]:
            for pattern in patterns:
                matched = [name for name in names if _matches(name, pattern)]
                if not matched:
                    msg = (
                        f"The pattern {pattern!r} matches no choice.{did_you_mean(pattern, near)} "
                        f"The choices are {listed(near)}."
                    )
                    raise SearchError(msg)
                if not any(name in unopened for name in matched):
                    msg = (
                        f"All choices that {pattern!r} matches ({listed(matched, 3)}) are open "
                        "before its phase. Leave it out, or put it before the other patterns."
                    )
                    raise SearchError(msg)
            unopened = {n: group for n, group in unopened.items() if not _any(n, patterns)}
        if unopened:
            msg = (
                f"No phase opens {listed(unopened, 3)}, so it would never be trained. Add it to a "
                "phase, or to free= if it should vary from the start."
            )
            raise SearchError(msg)

    def opened(self, space: SearchSpace, phase: Phase) -> SearchSpace | None:
        """Return the part of a space that is open in a phase; None: the largest subnet alone."""
        values, largest = space.values, space.largest.active
        opened: dict[str, list[Value]] = {}
        for name, choice in space.choices.items():
            distinct = [v for i, v in enumerate(choice.values) if choice.representative(i) == i]
            inward = [v for v in distinct if v in values[name]]
            if choice.ordered:
                inward.reverse()
            first = largest.get(name, inward[0])
            outermost = inward[: self._n_open(name, len(inward), phase)]
            opened[name] = [v for v in distinct if v in outermost or v == first]
        try:
            return space.narrowed_to(opened)
        except SpaceError:  # a single subnet is left
            return None

    def _n_open(self, name: str, n: int, phase: Phase) -> int:
        """Return the number of a choice's n values that are open in a phase."""
        if _any(name, self.free):
            return n
        opens = next((patterns for patterns in self._opens if _any(name, patterns)), None)
        if opens is None or phase.number == 0:
            return 1
        order = self._opens.index(opens) - self._opens.index(phase.opens)
        if order:
            return n if order < 0 else 1
        return 1 + -(-(n - 1) * phase.part // phase.parts)

    def __repr__(self) -> str:
        parts = [f"{', '.join(p.opens) or 'warm-up'} from {p.start}" for p in self.phases]
        return f"<ProgressiveShrinking, in {self.unit}: {'; '.join(parts)}>"


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    items: tuple[Any, ...] = tuple(patterns) if isinstance(patterns, list | tuple) else (patterns,)
    if any(not isinstance(pattern, str) or not pattern for pattern in items):
        msg = (
            f"{patterns!r:.60} is not a pattern of names. "
            "Write 'ks.*', or ('d.*', 'w.*') for several."
        )
        raise SearchError(msg)
    return items


def _group(name: str) -> str:
    """Return `ks` of `ks.0`, and nothing of a name without a number."""
    stem, _, tail = name.rpartition(".")
    return stem if tail.isdigit() else ""


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or _group(name) == pattern or fnmatchcase(name, pattern)


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(_matches(name, pattern) for pattern in patterns)
