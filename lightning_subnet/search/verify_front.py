# SPDX-License-Identifier: Apache-2.0
"""A second look at the front: noisy measures are taken again, so that a lucky draw does not win.

A search keeps the luckiest of noisy values. A second, independent value is not the luckiest of
anything: it stands beside the first in the study, and decides the front.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lightning_subnet.search.session import Session
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.history import Evaluation, Verified, with_verified

if TYPE_CHECKING:
    from lightning_subnet.study.storage import Study

_log = logging.getLogger(__name__)


def noisy_names(session: Session) -> list[str]:
    """Return the measures whose value would differ if the same subnet were measured again."""
    return [n for n, m in session.measures.items() if not m.exact and n in session.problem.names]


def verified_values(session: Session) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the second values that are stored for the noisy measures of a session."""
    return stored_verified(session.study, noisy_names(session))


def stored_verified(
    study: Study, names: Iterable[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the second values of some measures that a study has."""
    verified: dict[str, dict[str, tuple[float, float]]] = {}
    for name in names:
        for key, pair in study.storage.values_of(_fingerprint(study, name)).items():
            verified.setdefault(key, {})[name] = pair
    return verified


def keep_verified(session: Session, verified: Verified) -> None:
    """Store second values that another process has measured."""
    for evaluation in session.history:
        for name, (value, error) in verified.get(evaluation.subnet.key, {}).items():
            session.study.storage.keep_value(
                _fingerprint(session.study, name), evaluation.subnet, value, error
            )


def verify_front(session: Session) -> dict[str, list[float]]:
    """Take noisy measures of the front once more, until every subnet on it was measured twice.

    A measurement that fails leaves the first value in force.

    Returns:
        The relative change of each value, by name of measure.
    """
    names = noisy_names(session)
    changes: dict[str, list[float]] = {name: [] for name in names}
    tried: set[Subnet] = set()
    while names:
        verified = verified_values(session)
        front = session.problem.front(with_verified(session.history, verified))
        once = [e for e in front if e.subnet.key not in verified and e.subnet not in tried]
        if not once:
            break
        tried |= {e.subnet for e in once}
        for name in names:
            changes[name] += _measure_again(session, once, name)
    return {name: values for name, values in changes.items() if values}


def _measure_again(session: Session, evaluations: Sequence[Evaluation], name: str) -> list[float]:
    """Store second values, and return by how much each differs, relative to the first."""
    space, changes = session.problem.space, []
    X = space.indices([e.subnet for e in evaluations])
    values, errors, failures = session.measures[name].evaluate_each(space, X)
    for i, why in failures.items():
        _log.warning("%s of %s could not be measured again.", name, evaluations[i], exc_info=why)
    fingerprint = _fingerprint(session.study, name)
    for evaluation, value, error in zip(evaluations, values.tolist(), errors.tolist(), strict=True):
        if math.isfinite(value):
            session.study.storage.keep_value(fingerprint, evaluation.subnet, value, error)
            if before := evaluation.values[name]:
                changes.append(value / before - 1)
    return changes


def _fingerprint(study: Study, name: str) -> str:
    return f"verified:{study.name}:{name}"
