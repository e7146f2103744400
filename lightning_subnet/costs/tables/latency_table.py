# SPDX-License-Identifier: Apache-2.0
"""Latency of subnets as a sum over their blocks, each of which was timed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_subnet._json import digest, read, unreadable, write
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.inputs import batched, described
from lightning_subnet._types import Floats, Indices
from lightning_subnet.costs.latency.latency import Latency
from lightning_subnet.costs.resolve import part_with_sample
from lightning_subnet.costs.tables.blocks import BlockBench, Choose, Tracer
from lightning_subnet.costs.tables.files import (
    Agreement,
    check_device,
    check_space,
    device_of,
    settings_of,
)
from lightning_subnet.costs.tables.places import Place, layout, trace_sample
from lightning_subnet.errors import MeasurementError, ObjectiveError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure

_FORMAT = "lightning-subnet latency table 1"
_SPREAD = 400  # subnets among which those that calibrate are chosen
_FEWEST = 3
_CLEAR, _AGAIN = 0.02, 2  # a block is timed again while its error is more than this share of it


@dataclass(frozen=True)
class BlockTime:
    """The latency of one kind of block.

    Args:
        text: The block and the shapes of its inputs.
        ms: Its latency alone.
        error: The standard error of that.
    """

    text: str
    ms: float
    error: float


class LatencyTable:
    """Milliseconds of a subnet, as `scale * (sum of its blocks' times) + constant`.

    `build` times each different block once, in turns with the slowest, and fits scale and constant
    to a few subnets timed as a whole, as the sum leaves out the work between the blocks, and a
    block alone finds its weights in the caches. It is a measure for
    `SubnetSearch(measures=[table])`: exact, as it gives the same every time, so it costs no budget;
    `report` says how true it is, and `result.remeasure(Latency(...))` measures the front.

    Where the blocks depend on few choices each, as in this package's networks, thousands of subnets
    are looked up at once; else one subnet after the other is traced.

    Attributes:
        blocks: The latency of each kind of block, by key.
        report: How well it agrees with whole subnets that it was not fitted to.
        device: The device that it was measured on, in words.
        space: The space of its subnets.

    Example:
        >>> import torch
        >>> from lightning_subnet import Latency
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10, depths=(1,), expansions=(1, 2))
        >>> quick = Latency(repeats=15, seconds=0.0)
        >>> table = LatencyTable.build(net, torch.zeros(1, 1, 8, 8), latency=quick, calibrate=3,
        ...                            check=3)
        >>> milliseconds = table.predict([table.space.smallest, table.space.largest])
        >>> bool((milliseconds > 0).all()), len(table.blocks)
        (True, 14)

    References:
        Cai et al., ProxylessNAS, ICLR 2019, section 3.3.2, and Once-for-All, ICLR 2020, section 3.4
        (latency lookup tables).
    """

    def __init__(  # noqa: PLR0913 - the parts of a file
        self,
        *,
        name: str,
        device: str,
        conditions: Mapping[str, Any],
        space: SearchSpace,
        blocks: Mapping[str, BlockTime],
        places: Sequence[Place] | None,
        scale: float = 1.0,
        constant: float = 0.0,
        report: Agreement | None = None,
        allowed: str | None = None,
    ) -> None:
        self.name, self.device, self.conditions = name, device, dict(conditions)
        self.space, self.blocks, self.places = space, dict(blocks), places
        self.scale, self.constant, self.report = scale, constant, report
        self._allowed = allowed
        self._ms = {key: block.ms for key, block in self.blocks.items()}
        self._sizes = [len(choice.values) for choice in space.choices.values()]
        self._tracer: Tracer | None = None

    # Building

    @classmethod
    def build(
        cls,
        model: nn.Module,
        example_input: Any = None,
        *,
        latency: Latency | None = None,
        blocks: Choose | None = None,
        calibrate: int = 10,
        check: int = 20,
        seed: int = 0,
    ) -> LatencyTable:
        """Time the blocks of a super-network on this machine.

        Args:
            model: A super-network whose subnets can be sliced (`extract`).
            example_input: One sample, as the super-network takes it; None: the `input` of
                `latency`, or what the super-network gets of the model's `example_input_array`.
            latency: How to time; None: `Latency()`.
            blocks: Called with an extracted network, returns its modules that are timed as one
                each; None: children of the network and of the containers in it.
            calibrate: Whole subnets that scale and constant are fitted to; 0: they are 1 and 0.
            check: Other random subnets that it is compared with at once, for `report`.
            seed: Of the random subnets.

        Raises:
            MeasurementError: The network cannot be sliced, or does not take the input.
            ObjectiveError: There is no sample, or there are too few subnets to fit to.
        """
        latency = Latency() if latency is None else latency
        if not isinstance(latency, Latency):
            msg = f"latency={latency!r:.60} is not a Latency. Write latency=Latency(threads=1)."
            raise ObjectiveError(msg)
        if 0 < calibrate < _FEWEST or calibrate < 0 or check < 0:
            msg = (
                f"calibrate={calibrate} must be 0 or at least {_FEWEST}, and check={check} from 0."
            )
            raise ObjectiveError(msg)
        elastic, example = _part_with_sample(model, example_input, latency)
        sample = batched(example, who="LatencyTable")
        device, rng = device_of(latency), np.random.default_rng(seed)
        tracer = Tracer(elastic, sample, blocks)
        places = layout(tracer, rng=rng)
        if places is None:
            trace_sample(tracer, rng=rng)
        whole = latency.bind(elastic, sample)
        table = cls(
            name=latency.name,
            device=device,
            conditions=settings_of(latency) | {"input": described(sample)},
            space=tracer.space,
            blocks=_time_blocks(tracer, latency),
            places=places,
            allowed=device,
        )
        table._tracer = tracer
        if calibrate:
            table._calibrate(whole, calibrate, rng)
        if check:
            table.report = table._agreement(whole, check, rng)
        return table

    def _calibrate(self, whole: Measure, n: int, rng: np.random.Generator) -> None:
        """Fit scale and constant to subnets spread over the range of the sums."""
        space = self.space
        subnets = [space.smallest, space.largest, *space.sample(min(_SPREAD, space.size), rng)]
        if self.places is None:
            subnets = subnets[: 4 * n]  # each is traced
        X = space.indices(subnets)
        sums = self._sums(X)
        at = np.argsort(sums)[np.linspace(0, len(sums) - 1, n).astype(int)]
        ms = whole.evaluate(space, X[at])[0]
        # Relative errors, as latencies span an order of magnitude.
        design = np.stack([sums[at], np.ones(n)], axis=1) / ms[:, None]
        (scale, constant), *_ = np.linalg.lstsq(design, np.ones(n), rcond=None)
        if scale <= 0:  # the noise is larger than all differences
            scale, constant = float(np.median(ms / sums[at])), 0.0
        self.scale, self.constant = float(scale), float(constant)

    # Predicting

    def predict(self, subnets: Iterable[Subnet]) -> Floats:
        """Return the latency (n,) of subnets, in ms.

        Raises:
            MeasurementError: The subnets must be traced, and the table was loaded: bind it first.
        """
        return self._predict(self.space.indices(subnets))

    def _predict(self, X: Indices) -> Floats:
        return self.scale * self._sums(X) + self.constant

    def _sums(self, X: Indices) -> Floats:
        if self.places is not None:
            total = np.zeros(len(X))
            for place in self.places:
                total += place.costs(X, self._sizes, self._ms)
            return total
        if self._tracer is None:
            msg = "This table traces networks: call table.bind(model, example_input) first."
            raise MeasurementError(msg)
        return np.array([self._trace(subnet) for subnet in self.space.from_indices(X)])

    def _trace(self, subnet: Subnet) -> float:
        """Return the sum of a subnet's blocks."""
        assert self._tracer is not None
        keys = self._tracer(subnet)
        if unknown := [place for place, key in keys.items() if key not in self._ms]:
            msg = f"The block {unknown[0]} of {subnet!r:.120} was never timed."
            raise RuntimeError(msg)
        return sum(self._ms[key] for key in keys.values())

    def bind(self, elastic: nn.Module, example_input: Any) -> Measure:
        """Return the measure of a super-network.

        Raises:
            MeasurementError: The table is of another device, another space, or other blocks.
        """
        what = f"The table of {self.name!r}"
        check_device(what, self.device, self._allowed)
        tracer = Tracer(elastic, example_input)
        check_space(what, self.space, tracer.space)
        ends = (self.space.smallest, self.space.largest)
        for subnet in ends if self._tracer is None else ():
            try:
                self._tracer = tracer
                self._trace(subnet)
            except RuntimeError as error:
                self._tracer = None
                msg = (
                    f"{what} is of another network, or another input: {error}\n"
                    f"It was built with {self.conditions.get('input')}. Build one with this."
                )
                raise MeasurementError(msg) from error
        if self.places is not None:
            return self.measure

        def predict(subnets: list[Subnet]) -> list[float]:
            return [float(value) for value in self.predict(subnets)]

        return Measure(self.name, predict, "ms", exact=True, fingerprint=self.fingerprint)

    @property
    def measure(self) -> Measure:
        """The measure of value indices, which needs no network; of a table without tracing.

        Raises:
            MeasurementError: The subnets must be traced, or the table is of another device.
        """
        check_device(f"The table of {self.name!r}", self.device, self._allowed)
        if self.places is None:
            msg = "This table traces networks, one by one: give it to a search in measures=."
            raise MeasurementError(msg)
        return Measure(
            self.name, self._predict, "ms", exact=True, takes="indices",
            fingerprint=self.fingerprint,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """A hash of all that its predictions depend on."""
        parts = [self._ms, self.scale, self.constant, self.device, self.space.fingerprint]
        return f"table of {self.name}: {digest(parts)}"

    def check(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        latency: Latency | None = None,
        n: int = 20,
        seed: int = 1,
    ) -> Agreement:
        """Time random whole subnets, and return how well the table agrees with them.

        Args:
            model: The super-network.
            example_input: As for `build`.
            latency: How to time; None: as the table's blocks, on `"cpu"`.
            n: How many.
            seed: Of the random subnets.
        """
        if latency is None:
            settings = {k: v for k, v in self.conditions.items() if hasattr(Latency, k)}
            latency = Latency(**{k: v for k, v in settings.items() if k != "input"})
        elastic, sample = _part_with_sample(model, example_input, latency)
        whole = latency.bind(elastic, sample)
        self.bind(elastic, sample)
        return self._agreement(whole, n, np.random.default_rng(seed))

    def _agreement(self, whole: Measure, n: int, rng: np.random.Generator) -> Agreement:
        X = self.space.sample_indices(min(n, self.space.size), rng)
        return Agreement.of(self._predict(X), whole.evaluate(self.space, X)[0])

    # Files

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; `load` reads it back."""
        places = None
        if self.places is not None:
            places = [
                {"at": list(p.at), "keys": [[list(c), key] for c, key in p.keys.items()]}
                for p in self.places
            ]
        data = {
            "format": _FORMAT,
            "name": self.name,
            "device": self.device,
            "conditions": self.conditions,
            "space": self.space.to_json(),
            "scale": self.scale,
            "constant": self.constant,
            "report": self.report.to_json() if self.report else None,
            "blocks": {key: asdict(block) for key, block in self.blocks.items()},
            "places": places,
        }
        write(path, data)

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> LatencyTable:
        """Return the table in a file that `save` wrote.

        Args:
            path: The file.
            device: Which device the table may be of: a part of its description, or `"any"`. None:
                of this machine's only, which is checked where the table is used.

        Raises:
            StorageError: The file is not a table's.
            MeasurementError: The table is of another device than `device`.
        """
        data = read(path, _FORMAT, cls.__name__)
        try:
            places = None
            if data["places"] is not None:
                places = [
                    Place(tuple(p["at"]), {tuple(c): key for c, key in p["keys"]})
                    for p in data["places"]
                ]
            report = Agreement(**data["report"]) if data["report"] else None
            table = cls(
                name=data["name"],
                device=data["device"],
                conditions=data["conditions"],
                space=SearchSpace.from_json(data["space"]),
                blocks={key: BlockTime(**block) for key, block in data["blocks"].items()},
                places=places,
                scale=float(data["scale"]),
                constant=float(data["constant"]),
                report=report,
                allowed=device,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(path, cls.__name__, error) from error
        if device is not None:
            check_device(f"The table of {table.name!r}", table.device, device)
        return table

    def __repr__(self) -> str:
        report = f"{self.report}" if self.report else "not checked"
        return f"<LatencyTable of {len(self.blocks)} blocks on {self.device}: {report}>"


def _part_with_sample(model: Any, example_input: Any, latency: Latency) -> tuple[nn.Module, Any]:
    if not isinstance(model, nn.Module):
        msg = f"A table is built of a super-network, not of {model!r:.60}. Pass the model."
        raise ObjectiveError(msg)
    return part_with_sample(model, example_input, latency)


def _time_blocks(tracer: Tracer, latency: Latency) -> dict[str, BlockTime]:
    """Return the times of all kinds of blocks, by key."""
    blocks = tracer.blocks()
    with random_state():
        bench = BlockBench(list(blocks.values()))
    alone, space = replace(latency, input=None).bind(bench, bench.inputs), bench.search_space()
    X = np.arange(len(blocks))[:, None]
    values, errors = alone.evaluate(space, X)
    for _ in range(_AGAIN):  # blocks that were disturbed; each counts in thousands of subnets
        rows = np.flatnonzero(errors > _CLEAR * values)
        if len(rows):
            new, error = alone.evaluate(space, X[rows])
            better = error < errors[rows]
            values[rows[better]], errors[rows[better]] = new[better], error[better]
    keys = list(blocks)
    return {
        keys[i]: BlockTime(blocks[keys[i]].text, float(value), float(error))
        for i, value, error in zip(bench.order, values, errors, strict=True)
    }
