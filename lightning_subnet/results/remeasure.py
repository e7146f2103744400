# SPDX-License-Identifier: Apache-2.0
"""A front measured again elsewhere: on another machine, another runtime, a phone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_subnet._messages import listed
from lightning_subnet.costs.resolve import resolve, with_sample
from lightning_subnet.errors import MeasurementError, ObjectiveError, SearchError
from lightning_subnet.results.record import SearchRecord
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.evaluators import as_numbers
from lightning_subnet.study.history import Evaluation, History
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.problem import check_part

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.training.validation.checks import Score
    from lightning_subnet.training.validation.frozen_data import Source

ValueOf = Callable[[Subnet], Any]
"""A function of a subnet that returns its value, or a pair (value, standard error)."""


def remeasured(
    record: SearchRecord,
    measure: Any,
    *,
    model: Any = None,
    example_input: Any = None,
    name: str | None = None,
) -> SearchRecord:
    """Return the front of a search as a record with new values of one measure.

    Its front, its best and its constraints go by the new values; those before stay as
    `<name>_before`. A subnet that fails is a failed evaluation with its reason. Where a bound is
    relative to the largest subnet, that is measured too.

    Args:
        record: The record of the search; `SearchResult.remeasure` passes itself.
        measure: A measure such as `Latency(...)`; a function of a subnet; or a mapping from subnets
            to values. Each value may be a pair (value, standard error).
        model: The super-network, for a measure of networks.
        example_input: One sample for it; None: the `input` of the measure, or the model's
            `example_input_array`.
        name: The name of the values, `"latency_ms"`, of a function or mapping; a measure has one.

    Raises:
        SearchError: There is no front, all of it failed, or the largest did where a bound is
            relative to it.
        ObjectiveError: Not a measure, no name, a value that is not a number, or no model where the
            measure needs one.
        MeasurementError: The measure can measure nothing.

    Example:
        >>> from lightning_subnet import FunctionEvaluator, SubnetSearch
        >>> search = SubnetSearch(space=SearchSpace(depth=[1, 2, 3, 4]), storage=None, budget=4,
        ...                       objectives={"error": "min", "latency_ms": "min"},
        ...                       strategy="random")
        >>> result = search.run(progress=False, evaluator=FunctionEvaluator(
        ...     lambda s: {"error": 1 / s["depth"], "latency_ms": s["depth"]}))
        >>> phone = result.remeasure(lambda s: 5.0 if s["depth"] > 2 else 1.0, name="latency_ms")
        >>> [(e.subnet["depth"], e.values["latency_ms"]) for e in phone.front]
        [(4, 5.0), (2, 1.0)]
    """
    space = record.problem.space
    front = record.front
    name, value_of = _named(measure, space, [e.subnet for e in front], model, example_input, name)
    exact = {key: value for key, value in record.problem.exact.items() if key != name}
    problem = replace(record.problem, exact=exact)
    if not len(front):
        msg = "There is no front to measure again: nothing feasible was found."
        raise SearchError(msg)
    again = [_again(before, i, name, value_of) for i, before in enumerate(front)]
    seconds = sum(e.seconds for e in again) / len(again)  # some are measured at once
    history = History(space, (replace(e, seconds=seconds) for e in again))
    if any(c.relative and c.name not in exact for c in problem.constraints):
        _add_reference(history, record.final.get(space.largest), name, value_of)
    if not history.ok.any():
        msg = f"All {len(history)} subnets of the front failed, the last with: {history[-1].reason}"
        raise SearchError(msg)
    return SearchRecord(problem, history, name=f"{record.name} remeasured".strip())


def _add_reference(
    history: History, before: Evaluation | None, name: str, value_of: ValueOf
) -> None:
    """Measure the largest subnet too, to which relative bounds refer."""
    largest = history.space.largest
    if largest in history:
        return
    again = _again(before or Evaluation(0, largest, {}), len(history), name, value_of)
    if name not in again.values:
        msg = (
            f"The bound on {name!r} is relative to the largest subnet, of which there is no value "
            f"({again.reason}). Give its value too: {largest!r:.120}."
        )
        raise SearchError(msg)
    if before is None:
        reason = "measured only as what relative bounds refer to"
        again = replace(again, status="failed", reason=reason)
    history.add(again)


def _named(
    measure: Any,
    space: SearchSpace,
    subnets: Sequence[Subnet],
    model: Any,
    example_input: Any,
    name: str | None,
) -> tuple[str, ValueOf]:
    """Return the name of the values and the function that gives them."""
    if isinstance(measure, NetworkMeasure) and not isinstance(measure, (Measure, type)):
        host, sample = with_sample(model, example_input)
        bound = resolve(host, [measure], sample=lambda: sample)
        (measure,) = bound.values()
    if isinstance(measure, Measure):
        return name or measure.name, _of_measure(measure, space, subnets)
    if not isinstance(name, str) or not name:
        msg = f"The values of {measure!r:.60} need a name: remeasure(..., name='latency_ms'), say."
        raise ObjectiveError(msg)
    if isinstance(measure, Mapping):
        return name, _of_mapping(measure, space)
    if callable(measure) and not isinstance(measure, type):
        return name, measure
    msg = (
        f"remeasure() got {measure!r:.60}. Give a measure such as Latency(...), a function of a "
        "subnet, or a mapping from subnets to values."
    )
    raise ObjectiveError(msg)


def _of_measure(measure: Measure, space: SearchSpace, subnets: Sequence[Subnet]) -> ValueOf:
    """Return a function of some subnets, which are measured at once, or of any other."""
    pairs: dict[Subnet, tuple[float, float]] = {}
    failed: dict[Subnet, Exception] = {}

    def value_of(subnet: Subnet) -> tuple[float, float]:
        if subnet not in pairs:
            several = subnets if subnet in subnets else [subnet]
            values, errors, failures = measure.evaluate_each(space, space.indices(several))
            both = zip(values.tolist(), errors.tolist(), strict=True)
            pairs.update(zip(several, both, strict=True))
            failed.update((several[i], why) for i, why in failures.items())
        if subnet in failed:
            raise failed[subnet]
        return pairs[subnet]

    return value_of


def _of_mapping(values: Mapping[Any, Any], space: SearchSpace) -> ValueOf:
    """Return a function that looks values up."""
    by_subnet = {_subnet(space, key): value for key, value in values.items()}

    def value_of(subnet: Subnet) -> Any:
        if subnet not in by_subnet:
            msg = f"no value came for it; there are values of {len(by_subnet)} other subnets"
            raise KeyError(msg)
        return by_subnet[subnet]

    return value_of


def _subnet(space: SearchSpace, key: Any) -> Subnet:
    if isinstance(key, Evaluation):
        key = key.subnet
    if not isinstance(key, Subnet):
        msg = f"The mapping has the key {key!r:.60}. Its keys are subnets: e.subnet for e in front."
        raise ObjectiveError(msg)
    return space.from_indices(space.indices([key]))[0]


def _again(before: Evaluation, number: int, name: str, value_of: ValueOf) -> Evaluation:
    """Return an evaluation with the new value, and the one before under `<name>_before`."""
    start = time.perf_counter()
    values, errors = dict(before.values), dict(before.errors)
    if name in values:
        values[f"{name}_before"] = values.pop(name)
        if name in errors:
            errors[f"{name}_before"] = errors.pop(name)
    reason = ""
    try:
        value, error = as_numbers({name: value_of(before.subnet)})[name]
        if math.isfinite(value):
            values[name] = value
            errors |= {name: error} if 0 < error < math.inf else {}
        else:
            reason = f"{name} is {value}"
    except (ObjectiveError, MeasurementError):
        raise
    except Exception as error:
        reason = f"{name}: {type(error).__name__}: {error}"
    return Evaluation(
        number=number,
        subnet=before.subnet,
        values=values,
        errors=errors,
        status="failed" if reason else "ok",
        reason=reason,
        seconds=time.perf_counter() - start,
        generation=before.generation,
    )


def validate_front(
    record: SearchRecord, model: Any, source: Source, trainer: Any, score: Score = "network"
) -> pd.DataFrame:
    """Validate the front on other data, scored as in its search; see `SearchResult.verify`."""
    import pandas as pd

    from lightning_subnet.training.validation.checks import Checks
    from lightning_subnet.training.validation.evaluator import TrainerEvaluator

    front = record.front
    rows: list[dict[str, float]] = []
    checks = Checks(repeat=False, calibration=False)  # the search has made them
    with TrainerEvaluator(model, source, trainer=trainer, score=score, checks=checks) as evaluator:
        check_part(record.history.space, evaluator.space)
        for evaluation in front:
            metrics = evaluator.evaluate(evaluation.subnet)
            rows.append({})
            if not any(o.name in metrics for o in record.objectives):
                msg = f"No objective was logged; logged: {listed(metrics)}."
                raise SearchError(msg)
            for objective in (o for o in record.objectives if o.name in metrics):
                name, worse = objective.name, 1.0 if objective.direction == "max" else -1.0
                before, now = evaluation.values[name], float(metrics[name])
                rows[-1][name] = before
                rows[-1][f"{name}_verified"] = now
                rows[-1][f"{name}_drop"] = worse * (before - now)
    return pd.DataFrame(rows, index=pd.Index([e.number for e in front], name="number"))
