# SPDX-License-Identifier: Apache-2.0
"""Settings: the arguments of a search as they were passed, each of them checked by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_subnet._checks import checked_int
from lightning_subnet.errors import SearchError
from lightning_subnet.search.budget import Budget
from lightning_subnet.search.study_header import Resume
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.storage import Storage
from lightning_subnet.training.validation.checks import FORMATS, Checks, Score, checked_score


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """The arguments of a `SubnetSearch`, which says what each is; `Plan` is what they mean.

    Raises:
        SearchError: `seed` or `calibration_images` is not a whole number from 0, `resume`, `space`,
            `score` or `checks` is none of what may be passed, `resume="must"` comes without a name,
            or a latency is measured in another runtime than that of `score`.
    """

    objectives: Mapping[str, str]
    constraints: Mapping[str, str | Sequence[str]] | None
    space: SearchSpace | None
    measures: Sequence[Measure | NetworkMeasure]
    strategy: str | Strategy
    budget: int | Budget
    storage: str | Storage | None
    name: str | None
    seed: int
    resume: Resume
    warm_start: Any
    trainer: Any
    calibration_images: int
    verify_front: bool
    score: Score = "network"
    checks: bool | Checks = True

    def __post_init__(self) -> None:
        for name in ("seed", "calibration_images"):
            number = checked_int(getattr(self, name), name, error=SearchError, least=0)
            object.__setattr__(self, name, number)
        checked_score(self.score)
        Checks.of(self.checks)
        self._check_runtimes()
        if self.resume not in ("auto", "must", "never"):
            msg = f"resume= must be 'auto', 'must' or 'never', not {self.resume!r}."
            raise SearchError(msg)
        if self.space is not None and not isinstance(self.space, SearchSpace):
            msg = (
                f"space={self.space!r:.60} is not a SearchSpace. Write space=SearchSpace({{...}})."
            )
            raise SearchError(msg)
        if self.name is None and self.resume == "must":
            msg = "resume='must' needs the name= of the study to go on with."
            raise SearchError(msg)

    def _check_runtimes(self) -> None:
        """Refuse a latency in another runtime than the one in which subnets are scored."""
        if self.score not in FORMATS:
            return
        from lightning_subnet.costs.resolve import make_measure, measure_names

        lone = isinstance(self.measures, (Measure, NetworkMeasure))
        measures: list[Any] = [self.measures] if lone else list(self.measures)
        names = {*self.objectives, *(self.constraints or ())} - {m.name for m in measures}
        measures += [make_measure(name) for name in sorted(names & set(measure_names()))]
        for measure in measures:
            runtime = getattr(measure, "runtime", self.score)
            if runtime != self.score:
                msg = (
                    f"score={self.score!r} validates what runs in {self.score}, and "
                    f"{measure.name!r} would be measured with runtime={runtime!r}: not of the same "
                    f"file. Write measures=[{type(measure).__name__}(runtime={self.score!r})]."
                )
                raise SearchError(msg)
