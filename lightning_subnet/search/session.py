# SPDX-License-Identifier: Apache-2.0
"""Session: the ask/tell engine.

It opens generations, hands subnets out once and records what was measured. Every proposal is
committed before it is handed out and every evaluation before the next starts, so a new process
that opens the same study goes on where a killed one stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_subnet._checks import checked_int
from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.errors import (
    MeasurementError,
    ObjectiveError,
    SearchError,
    SpaceExhausted,
    SubnetError,
    TellError,
)
from lightning_subnet.search.budget import Budget
from lightning_subnet.space.members import row_codes
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy, checked_proposals
from lightning_subnet.study.evaluators import Evaluator, as_numbers
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure
from lightning_subnet.study.problem import Problem
from lightning_subnet.study.storage import Study

_log = logging.getLogger(__name__)
_FIRST = 5  # evaluations that all fail show that something else is wrong

Pair = tuple[float, float]
"""A value and its standard error."""


class Session:
    """One search over one study.

    Args:
        problem: Space, objectives, constraints and exact measures.
        strategy: Proposes subnets.
        measures: The measures that are computed here, by name; all others are told.
        study: The place where generations and evaluations are committed.
        budget: When to stop.
        seed: Generation g draws from `default_rng([seed, g])`.
        first: Subnets to measure before the strategy is asked, as generation 0.

    Attributes:
        history: The evaluations so far.
        exhausted: Whether the strategy has found no subnet left to propose.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        *,
        measures: Mapping[str, Measure],
        study: Study,
        budget: Budget,
        seed: int,
        first: Sequence[Subnet] = (),
    ) -> None:
        self.problem = problem
        self.strategy = strategy
        self.measures = dict(measures)
        self.study = study
        self.budget = budget
        self.seed = seed
        self.exhausted = False
        space = problem.space
        self._generation: dict[bytes, int] = {}
        self._queue: list[Subnet] = []  # proposed, not handed out
        self._pending: dict[bytes, tuple[Subnet, float]] = {}  # handed out, and when
        self.history = History(space, study.evaluations(space))
        generations = study.generations(space)
        if not generations and first:
            generations = [study.add_generation(0, list(dict.fromkeys(first)))]
        self._n_generations = 0
        for subnets in generations:
            self._open(subnets)
        if (largest := self.history.get(space.largest)) is not None:
            self._tell_reference(largest)

    # Handing out

    @property
    def names_to_tell(self) -> tuple[str, ...]:
        """The measures that are not computed here."""
        return tuple(name for name in self.problem.names if name not in self.measures)

    @property
    def spent(self) -> int:
        """Evaluations that count towards the budget: all but those that the user attached."""
        return sum(evaluation.generation is not None for evaluation in self.history)

    @property
    def room(self) -> float:
        """The number of subnets that may still be handed out."""
        if self.budget.seconds is not None:
            seconds = sum(evaluation.seconds for evaluation in self.history)
            if seconds >= self.budget.seconds:
                return 0
        limit = math.inf if self.budget.evaluations is None else self.budget.evaluations
        return max(limit - self.spent - len(self._pending), 0)

    def ask(self, n: int = 1) -> list[Subnet]:
        """Return 1 to n subnets to measure, or none if the search is over.

        They come from the open generation; when that is used up the strategy opens the next one.
        """
        hint = "ask(n) returns at most n subnets."
        n = int(min(checked_int(n, "n", error=SearchError, hint=hint), self.room))
        if n < 1:
            return []
        if not self._queue and not self._propose():
            return []
        subnets, self._queue = self._queue[:n], self._queue[n:]
        now = time.perf_counter()
        for subnet in subnets:
            self._pending[self._code(subnet)] = (subnet, now)
        return subnets

    def give_back(self, subnet: Subnet) -> None:
        """Put a subnet that was handed out, and not recorded, back in front: it is asked next."""
        if self._pending.pop(self._code(subnet), None) is not None:
            self._queue.insert(0, subnet)

    def _propose(self) -> bool:
        """Open the next generation; return False if the space is exhausted."""
        if self.problem.needs_reference:
            self.problem.bounds(self.history)  # raises where the largest subnet is still to be told
        pending = [subnet for subnet, _ in self._pending.values()]
        number = self._n_generations
        rng = np.random.default_rng([self.seed, number])
        try:
            proposals = self.strategy.propose(
                self.problem, self.history, self.strategy.batch_size, rng, pending
            )
        except SpaceExhausted as end:
            _log.info("%s The search ends.", end)
            self.exhausted = True
            return False
        subnets = checked_proposals(self.strategy, proposals, self.problem, self.history, pending)
        self._open(self.study.add_generation(number, subnets))
        if not self._queue:  # another process opened this generation, and has measured it all
            self.sync()
            return self._propose()
        return True

    def _open(self, subnets: Sequence[Subnet]) -> None:
        for subnet in subnets:
            code = self._code(subnet)
            self._generation.setdefault(code, self._n_generations)
            if subnet not in self.history and code not in self._pending:
                self._queue.append(subnet)
        self._n_generations += 1

    def _code(self, subnet: Subnet) -> bytes:
        return row_codes(self.problem.space.indices([subnet]))[0]

    # Taking in

    def tell(self, subnet: Subnet | Mapping[str, Any], values: Mapping[str, Any]) -> Evaluation:
        """Record the told values of a subnet, and compute the measures that are computed here."""
        subnet = self._checked(subnet)
        pairs = as_numbers(values)
        if unknown := [name for name in pairs if name not in self.names_to_tell]:
            hint = (
                "It is computed by the search: leave it out."
                if unknown[0] in self.measures
                else f"{did_you_mean(unknown[0], self.names_to_tell)} "
                f"Expected: {listed(self.names_to_tell)}."
            )
            msg = f"{unknown[0]!r} is not a measure to be told. {hint.strip()}"
            raise TellError(msg)
        if missing := [name for name in self.names_to_tell if name not in pairs]:
            msg = (
                f"The value of {missing[0]!r} is missing; {listed(pairs)} came. "
                "Tell every measure of the objectives and constraints at once, "
                "or fail(subnet, reason)."
            )
            raise TellError(msg)
        fingerprints = self._fingerprints(None)
        return self._complete(
            subnet,
            pairs,
            seconds=self._since_asked(subnet),
            stored=self.study.storage.known_values(fingerprints, subnet),
            fingerprints=fingerprints,
        )

    def fail(self, subnet: Subnet | Mapping[str, Any], reason: str) -> Evaluation:
        """Record that a subnet could not be measured."""
        subnet = self._checked(subnet)
        return self._record(
            subnet, {}, reason=str(reason) or "no reason given", seconds=self._since_asked(subnet)
        )

    def measure(self, subnet: Subnet, evaluator: Evaluator | None) -> Evaluation:
        """Measure a subnet with an evaluator, reusing stored values, and record it."""
        fingerprints = self._fingerprints(evaluator)
        stored = self.study.storage.known_values(fingerprints, subnet)
        needed = [name for name in self.names_to_tell if name not in stored]
        start = time.perf_counter()
        pairs: dict[str, Pair] = {}
        if needed:
            if evaluator is None:
                msg = (
                    f"Nothing measures {needed[0]!r}: pass an evaluator to run(), "
                    "or a measure of that name in measures=."
                )
                raise SearchError(msg)
            try:
                measured = dict(evaluator.evaluate(subnet))
            except MeasurementError:
                raise
            except Exception as error:
                return self._record(
                    subnet, {}, reason=_reason(error), seconds=time.perf_counter() - start
                )
            if missing := [name for name in needed if name not in measured]:
                hint = did_you_mean(missing[0], [*measured, *evaluator.built_in])
                also = f" Built in: {listed(evaluator.built_in)}." if evaluator.built_in else ""
                msg = (
                    f"There is no {missing[0]!r}.{hint} "
                    f"Measured or logged: {listed(measured)}.{also}"
                )
                raise MeasurementError(msg)
            pairs = as_numbers({k: v for k, v in measured.items() if k not in self.measures})
        pairs |= {name: stored[name] for name in self.names_to_tell if name in stored}
        return self._complete(
            subnet,
            pairs,
            seconds=time.perf_counter() - start if needed else 0.0,
            stored=stored,
            fingerprints=fingerprints,
        )

    @property
    def only_failures(self) -> bool:
        """Whether there are a few evaluations, and all of them have failed."""
        most = self.budget.evaluations or _FIRST
        return len(self.history) >= min(_FIRST, most) and not self.history.ok.any()

    def give_up(self) -> None:
        """Forget evaluations that all failed, so that they can be repeated, and raise."""
        failed, self.history = self.history, History(self.problem.space)
        self.study.forget()
        msg = (
            f"The first {len(failed)} evaluations all failed, the last with: {failed[-1].reason}\n"
            "Nothing was recorded: remove the cause and search again under the same name."
        )
        raise SearchError(msg)

    def _fingerprints(self, evaluator: Evaluator | None) -> dict[str, str]:
        """Return the fingerprints of all measures that have one and are not exact."""
        prints = {name: evaluator.fingerprint(name) for name in self.names_to_tell if evaluator}
        prints |= {name: m.fingerprint for name, m in self.measures.items() if not m.exact}
        return {name: print_ for name, print_ in prints.items() if print_ is not None}

    def _checked(self, subnet: Subnet | Mapping[str, Any]) -> Subnet:
        """Return a subnet as a member of the space, or raise if it has an evaluation already."""
        space = self.problem.space
        subnet = space.from_indices(space.indices([space.subnet(subnet)]))[0]
        if (evaluation := self.history.get(subnet)) is not None:
            msg = (
                f"{subnet} was told already, as evaluation {evaluation.number}. "
                "The first values stay; a subnet is measured once."
            )
            raise TellError(msg)
        return subnet

    def _since_asked(self, subnet: Subnet) -> float:
        _, asked = self._pending.get(self._code(subnet), (subnet, None))
        return 0.0 if asked is None else time.perf_counter() - asked

    def _complete(
        self,
        subnet: Subnet,
        pairs: Mapping[str, Pair],
        *,
        seconds: float,
        stored: Mapping[str, Pair],
        fingerprints: Mapping[str, str],
    ) -> Evaluation:
        """Compute the measures that are computed here, and record the evaluation.

        Args:
            subnet: The subnet.
            pairs: Its values of the other measures, by name.
            seconds: The time that these have taken.
            stored: Values of equal fingerprint, by name, which are not computed again.
            fingerprints: Those under which new values are kept, by name.
        """
        pairs = dict(pairs)
        X = self.problem.space.indices([subnet])
        start = time.perf_counter()
        reasons = []
        for name, measure in self.measures.items():
            if name in stored and not measure.exact:
                pairs[name] = stored[name]
                continue
            try:
                values, errors = measure.evaluate(self.problem.space, X)
                pairs[name] = (float(values[0]), float(errors[0]))
            except (ObjectiveError, MeasurementError):
                raise
            except Exception as error:
                reasons.append(f"{name}: {_reason(error)}")
        seconds += time.perf_counter() - start
        names = {*self.problem.names, *self.measures}
        for name in [name for name, (value, _) in pairs.items() if not math.isfinite(value)]:
            value, _ = pairs.pop(name)
            if name in names:  # what else an evaluator returns may be anything
                reasons.append(f"{name} is {value}")
        return self._record(
            subnet,
            pairs,
            reason="; ".join(reasons),
            seconds=seconds,
            reused=tuple(name for name in stored if name in names),
            fingerprints=fingerprints,
        )

    def _record(
        self,
        subnet: Subnet,
        pairs: Mapping[str, Pair],
        *,
        reason: str,
        seconds: float,
        reused: tuple[str, ...] = (),
        fingerprints: Mapping[str, str] | None = None,
    ) -> Evaluation:
        evaluation = self.study.add_evaluation(
            Evaluation(
                number=len(self.history),
                subnet=subnet,
                values={name: value for name, (value, _) in pairs.items()},
                errors={name: error for name, (_, error) in pairs.items() if 0 < error < math.inf},
                status="failed" if reason else "ok",
                reason=reason,
                seconds=seconds,
                generation=self._generation.get(self._code(subnet)),
                reused=reused,
            ),
            fingerprints,
        )
        if evaluation.number > len(self.history):  # another process wrote in between
            self.sync()
        else:
            self._take(evaluation)
        return evaluation

    def _tell_reference(self, evaluation: Evaluation) -> None:
        """Tell measures the value of the largest subnet that was measured elsewhere or earlier."""
        for name, measure in self.measures.items():
            if measure.on_reference is not None and name in evaluation.values:
                measure.on_reference(evaluation.subnet, evaluation.values[name])

    def _take(self, evaluation: Evaluation) -> None:
        self.history.add(evaluation)
        if evaluation.reused and evaluation.subnet == self.problem.space.largest:
            self._tell_reference(evaluation)
        self._pending.pop(self._code(evaluation.subnet), None)
        if evaluation.subnet in self._queue:
            self._queue.remove(evaluation.subnet)

    def sync(self) -> None:
        """Add the evaluations that other processes have written to the study."""
        for item in self.study.evaluations(self.problem.space, start=len(self.history)):
            self._take(item)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    name = type(error).__name__
    if isinstance(error, SubnetError) and text:
        return text[0]
    return f"{name}: {text[0]}" if text else name
