# SPDX-License-Identifier: Apache-2.0
"""The header of a study, by which it is known again when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from lightning_subnet._json import digest
from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet.errors import SearchError, VersionWarning
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.strategies.base import Strategy
from lightning_subnet.study.measures import Measure
from lightning_subnet.study.problem import Problem

if TYPE_CHECKING:
    from lightning_subnet.study.storage import Storage, Study

Resume = Literal["auto", "must", "never"]

_RECORDED = ("lightning-subnet", "numpy", "pymoo", "torch", "lightning", "torchmetrics")


def make_header(
    problem: Problem,
    strategy: Strategy,
    *,
    measures: Sequence[Measure],
    provenance: Mapping[str, Any],
    seed: int,
    first: Sequence[Subnet],
    warm_from: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all settings that proposals and values depend on, as JSON-able data.

    Args:
        problem: Space, objectives and constraints.
        strategy: Its name and settings are part of the header.
        measures: The measures that the search computes.
        provenance: All that the values of an evaluator depend on besides the subnet.
        seed: The seed of all proposals.
        first: The subnets that are measured first.
        warm_from: The names of the searches from whose fronts these come.
    """
    space = problem.space.to_json()
    return {
        "space": space["choices"],
        "order": list(problem.space.names),  # what measures of indices see
        "pool": digest(space["pool"]) if "pool" in space else None,
        "objectives": {o.name: o.direction for o in problem.objectives},
        "constraints": [c.to_json() for c in problem.constraints],
        "measures": {m.name: {"exact": m.exact, "fingerprint": m.fingerprint} for m in measures},
        "evaluator": dict(provenance),
        "strategy": {"name": getattr(strategy, "name", type(strategy).__name__)}
        | strategy.settings(),
        "seed": seed,
        "warm_start": [subnet.to_json() for subnet in first],
        **({"warm_from": list(warm_from)} if warm_from else {}),
        **({"values": space["values"]} if "values" in space else {}),
    }


def open_study(
    storage: Storage,
    name: str,
    header: Mapping[str, Any],
    problem: Problem,
    resume: Resume,
    *,
    hardware: str = "",
) -> Study:
    """Return the study of that name, or a new one.

    Args:
        storage: The storage of the study.
        name: The study's name.
        header: The header that the study must have.
        problem: Its space is stored with a new study.
        resume: `"auto"`, `"must"` or `"never"`; see `SubnetSearch`.
        hardware: What values are computed on, in words; noted in a new study.

    Raises:
        StudyMismatchError: A stored study of this name was made with other settings.
        SearchError: `resume` forbids it.
    """
    versions = {package: _version(package) for package in _RECORDED}
    of_new = versions | ({"hardware": hardware} if hardware else {})
    study = storage.find_study(name)
    if study is None and resume == "must":
        names = storage.study_names()
        msg = (
            f"There is no study {name!r} in {storage.url!r}, and resume='must'."
            f"{did_you_mean(name, names)} It holds: {listed(names)}."
        )
        raise SearchError(msg)
    if study is None:
        return storage.create_study(name, header, problem.space, of_new)
    if resume == "never":
        msg = (
            f"Study {name!r} exists in {storage.url!r}, and resume='never'. "
            "Give this search another name=."
        )
        raise SearchError(msg)
    if digest(study.header["warm_start"]) == digest(header["warm_start"]):
        start = {k: v for k, v in study.header.items() if k == "warm_from"}
        header = {k: v for k, v in header.items() if k != "warm_from"} | start  # names aside
    if not study.has() and study.differences(header):
        study.forget(whole=True)  # nothing was measured: its settings were a mistake
        return storage.create_study(name, header, problem.space, of_new)
    study.check(header)
    stored = study.versions  # an earlier version of this package may have recorded fewer
    changed = [f"{k} {stored[k]} -> {v}" for k, v in versions.items() if stored.get(k, v) != v]
    if changed:
        warn(
            f"Study {name!r} was made with other versions ({', '.join(changed)}); proposals may "
            "differ from an uninterrupted run.",
            VersionWarning,
        )
    return study


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
