# SPDX-License-Identifier: Apache-2.0
"""Specialisation: one super-network searched for several hardware settings, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_subnet._messages import listed
from lightning_subnet.errors import SearchError
from lightning_subnet.results.result import SearchResult
from lightning_subnet.search.search import SubnetSearch
from lightning_subnet.study.measures import Measure, NetworkMeasure
from lightning_subnet.study.storage import Storage


def specialise(  # noqa: PLR0913 - the parts of a study of several settings
    model: Any,
    datamodule: Any = None,
    *,
    settings: Sequence[Measure | NetworkMeasure] | Mapping[str, Measure | NetworkMeasure],
    objectives: Mapping[str, str],
    scout: str | None = None,
    name: str = "specialise",
    storage: str | Storage | None = "sqlite:///subnet_search.db",
    warm_start: Any = (),
    dataloaders: Any = None,
    train_dataloaders: Any = None,
    progress: bool = True,
    **search: Any,
) -> dict[str, SearchResult]:
    """Search the subnets of a model for several hardware settings, one search each.

    The searches share a storage, so a subnet is validated once over all of them and only its cost
    is measured anew; a reused value counts towards the budget, which each search has for itself.
    Each starts from the fronts of those before. They are studies named `<name>/<label>`, so a run
    that was interrupted goes on.

    Args:
        model: As for `SubnetSearch.fit`.
        datamodule: Its data.
        settings: A measure for each hardware setting, all of one name, such as
            `[Latency(threads=1), Latency(batch_size=8)]`; as a mapping with the labels they shall
            have.
        objectives: The measures to optimise, the name of the settings' measures among them.
        scout: An exact measure, such as `"macs"`: a search with it in place of the settings'
            measure comes first, and the others start from its front.
        name: The first part of the studies' names.
        storage: A database URL, or a `Storage`; None keeps everything in memory.
        warm_start: The subnets that the first search measures first; see `SubnetSearch`.
        dataloaders: Validation dataloaders, instead of a datamodule.
        train_dataloaders: Training data that recalibrates BatchNorm, beside `dataloaders`.
        progress: Show progress.
        **search: Further settings of each search, such as `strategy`, `budget` and `constraints`.

    Returns:
        The results by label, in the order of the searches; that of the scout under its name.

    Raises:
        SearchError: There are no settings, two of them have one label, or their measures do not
            have the name of one objective. Nothing was measured then.

    Example:
        >>> import lightning as L, torch
        >>> from lightning_subnet import Latency
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> class Lit(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = ElasticMobileNetV3.tiny(n_classes=2)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def validation_step(self, batch, _):
        ...         self.log("loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
        >>> data = torch.utils.data.TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4) % 2)
        >>> batches = torch.utils.data.DataLoader(data, batch_size=4)
        >>> quick = {"repeats": 15, "seconds": 0.01}
        >>> results = specialise(
        ...     Lit(), dataloaders=batches, objectives={"loss": "min", "latency_ms": "min"},
        ...     settings=[Latency(**quick), Latency(batch_size=4, **quick)], strategy="random",
        ...     budget=3, calibration_images=0, storage=None, verify_front=False, progress=False)
        >>> {label: len(result.history) for label, result in results.items()}
        {'cpu-batch1-threads1': 3, 'cpu-batch4-threads1': 3}

    References:
        Cummings et al., A Hardware-Aware System for Accelerating Deep Neural Network Optimization,
        arXiv:2202.12954 (warm start from another hardware setting).
    """
    by_label = _by_label(settings)
    cost = _common_name(by_label, objectives)
    common = {**search, "storage": storage if isinstance(storage, Storage) else Storage(storage)}
    others = list(common.pop("measures", ()))
    if scout is not None and (scout in objectives or scout in by_label):
        msg = f"scout={scout!r} is an objective or a label already. Name another exact measure."
        raise SearchError(msg)
    searches: dict[str, SubnetSearch] = {}
    if scout is not None:
        bounds = {k: v for k, v in (common.get("constraints") or {}).items() if k != cost}
        searches[scout] = SubnetSearch(
            objectives={
                scout if k == cost else k: direction for k, direction in objectives.items()
            },
            measures=others,
            name=f"{name}/{scout}",
            **{**common, "constraints": bounds},
        )
    for label, measure in by_label.items():
        searches[label] = SubnetSearch(
            objectives=objectives, measures=[*others, measure], name=f"{name}/{label}", **common
        )
    results: dict[str, SearchResult] = {}
    for label, plain in searches.items():
        before = [result for result in results.values() if len(result.front)]
        results[label] = plain.replace(warm_start=before or warm_start).fit(
            model,
            datamodule,
            dataloaders=dataloaders,
            train_dataloaders=train_dataloaders,
            progress=progress,
        )
    return results


def _by_label(settings: Any) -> dict[str, Any]:
    """Return the measures of the settings by label."""
    if isinstance(settings, Mapping):
        by_label = dict(settings)
    else:
        measures = list(settings) if isinstance(settings, Iterable) else [settings]
        labels = [_label(measure) for measure in measures]
        if twice := [label for label in labels if labels.count(label) > 1]:
            msg = (
                f"Two settings are {twice[0]!r}. Give them labels of their own: "
                "settings={'laptop': Latency(...), 'server': Latency(...)}."
            )
            raise SearchError(msg)
        by_label = dict(zip(labels, measures, strict=True))
    if not by_label:
        msg = "settings= is empty. Give a measure for each hardware setting: [Latency(), ...]."
        raise SearchError(msg)
    for label, measure in by_label.items():
        if isinstance(measure, type) or not isinstance(measure, (Measure, NetworkMeasure)):
            msg = (
                f"The setting {label!r} is {measure!r:.60}, which is not a measure. "
                "Give Latency(...), or a function decorated with @measure."
            )
            raise SearchError(msg)
    return by_label


def _label(measure: Any) -> str:
    device = getattr(measure, "device", None)
    if device is None:
        return str(getattr(measure, "name", measure))
    threads = f"-threads{measure.threads}" if getattr(measure, "threads", None) else ""
    label = f"{device}-batch{getattr(measure, 'batch_size', 1)}{threads}"
    usual = (("runtime", "eager"), ("precision", None))
    unusual = [str(v) for name, value in usual if (v := getattr(measure, name, value)) != value]
    return "-".join([label, *unusual])


def _common_name(by_label: Mapping[str, Any], objectives: Mapping[str, str]) -> str:
    """Return the one name that the measures of all settings have, which is an objective."""
    names = list(dict.fromkeys(measure.name for measure in by_label.values()))
    if len(names) > 1 or names[0] not in objectives:
        msg = (
            f"The measures of the settings are named {listed(names)}, and the objectives "
            f"{listed(objectives)}. Give all of them one name, which is an objective."
        )
        raise SearchError(msg)
    return str(names[0])
