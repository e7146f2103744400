# SPDX-License-Identifier: Apache-2.0
"""The properties of the matrix: what a family must keep, each computed by means of its own.

Scores come from `SubnetSearch.fit` and from `TrainerEvaluator`, subnets from `result.extract`, and
files from `export`; what they are compared with is none of the package's.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_subnet import Subnet, SubnetSearch, extract, recalibrate
from lightning_subnet._torch.contexts import evaluating
from lightning_subnet._torch.outputs import default_tolerance, difference
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.export import export, load_exported
from lightning_subnet.strategies import Strategy
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from tests.families.family import N_TRAIN, Family
from tests.networks import quiet_trainer

N_SUBNETS = 5
COSTS = ("macs", "params")
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A cell of the matrix.

    Args:
        ok: Whether the property holds.
        value: What was measured, in a few words.
    """

    ok: bool
    value: str


class Given(Strategy):
    """Proposes subnets that are given, in their order."""

    name = "given"

    def __init__(self, subnets: Sequence[Subnet]) -> None:
        self._subnets, self.batch_size = list(subnets), len(subnets)

    def propose(
        self, problem: Any, history: Any, n: int, rng: Any, pending: Sequence[Subnet] = ()
    ) -> list[Subnet]:
        """Return those that are neither measured nor pending."""
        known = {evaluation.subnet for evaluation in history} | set(pending)
        return [subnet for subnet in self._subnets if subnet not in known][:n]


@dataclass
class Scored:
    """What was seen while a subnet was scored.

    Args:
        values: The metrics.
        calls: The inputs of the module in its validation.
        outputs: And its outputs.
    """

    values: dict[str, float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class Checked:
    """A family under test; what is costly is computed once.

    Args:
        family: The family.
        shipped: How many of its subnets are extracted and counted, the ends of the space first.
        converted: How many of these are written as files.
    """

    def __init__(self, family: Family, *, shipped: int = N_SUBNETS, converted: int = 1) -> None:
        self.family, self._shipped, self._converted = family, shipped, converted

    @cached_property
    def model(self) -> L.LightningModule:
        """The module."""
        return self.family.build()

    @cached_property
    def subnets(self) -> list[Subnet]:
        """The largest, the smallest and random subnets."""
        part: Any = elastic_part(self.model)
        space = part.search_space()
        drawn = [space.largest, space.smallest, *space.sample(min(8 * N_SUBNETS, space.size), 0)]
        subnets = list(dict.fromkeys(drawn))[:N_SUBNETS]
        assert len(subnets) == N_SUBNETS
        return subnets

    @cached_property
    def shipped(self) -> list[Subnet]:
        """Those that are extracted and counted."""
        return self.subnets[: self._shipped]

    @cached_property
    def result(self) -> Any:
        """A search that measures these subnets, with all of its checks."""
        train, val = self.family.loaders()
        search = SubnetSearch(
            objectives={"val_loss": "min"} | dict.fromkeys(COSTS, "min"),
            strategy=Given(self.shipped),
            budget=len(self.shipped),
            storage=None,
            trainer=quiet_trainer(),
            calibration_images=N_TRAIN,
        )
        result = search.fit(self.model, dataloaders=val, train_dataloaders=train, progress=False)
        assert {e.subnet for e in result.history if e.ok} == set(self.shipped)
        return result

    @cached_property
    def plain(self) -> dict[Subnet, nn.Module]:
        """The extracted subnets."""
        return {subnet: self.result.extract(subnet) for subnet in self.shipped}

    @cached_property
    def scored(self) -> dict[Subnet, Scored]:
        """What was seen in the first order."""
        return self.scores(self.subnets)

    def scores(self, order: Sequence[Subnet]) -> dict[Subnet, Scored]:
        """Score subnets in an order."""
        train, val = self.family.loaders()
        source = Source(None, val, train, calibration_images=N_TRAIN)
        seen: dict[Subnet, Scored] = {}
        evaluator = TrainerEvaluator(self.model, source, trainer=quiet_trainer())
        with recorded(self.model) as record, evaluator:
            for subnet in order:
                values = dict(evaluator.evaluate(subnet))
                n = len(val)  # the last are of the validation, after those that recalibrate
                # Copied here, as validation runs in inference mode.
                calls = [tree_map(_copy, call) for call in record.calls[-n:]]
                seen[subnet] = Scored(values, calls, record.outputs[-n:])
        return seen

    # The properties

    def isolated(self) -> Cell:
        """Scores of the same subnets in three orders are equal to the last bit."""
        n = len(self.subnets)
        shuffled = [self.subnets[i] for i in np.random.default_rng(0).permutation(n)]
        seen = [self.scored, self.scores(self.subnets[::-1]), self.scores(shuffled)]
        orders = [{s: scored.values["val_loss"] for s, scored in one.items()} for one in seen]
        distinct = len(set(orders[0].values()))
        gap = max(abs(orders[0][s] - other[s]) for other in orders[1:] for s in self.subnets)
        ok = gap == 0 and distinct == n and all(map(math.isfinite, orders[0].values()))
        return Cell(ok, f"{n} subnets, {distinct} scores, difference {gap:.2g}")

    def renewed(self) -> Cell:
        """Once recalibrated on a batch, evaluation gives what normalising by that batch gives."""
        part: Any = elastic_part(self.model)
        x = next(iter(DataLoader(self.family.data()[0], batch_size=N_TRAIN)))
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules()):
            return Cell(True, "no BatchNorm")
        worst, changed = 0.0, 0.0
        for subnet in self.subnets:
            part.activate(subnet)
            net = part if _runs(part, x[0]) else extract(part, subnet)
            before = copy.deepcopy(net.state_dict())
            net.train()
            for module in net.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            with torch.no_grad(), unbiased():
                expected = net(x[0])
            with unbiased():
                recalibrate(net, [x[0]])
            output = _run(net)(x[0])
            net.load_state_dict(before)
            net.eval()
            worst = max(worst, difference(expected, output).relative)
            changed = max(changed, difference(expected, _run(net)(x[0])).relative)
        return Cell(worst < 1e-3 and changed > 0.03, f"{worst:.1g}, {changed:.1g} before")

    def extracted(self) -> Cell:
        """An extracted subnet gives the outputs that were scored, on all validation samples."""
        return self._largest_difference(
            lambda subnet: _run(self.plain[subnet]), self.shipped, lambda s: self.scored[s].outputs
        )

    def onnx(self) -> Cell:
        """Its ONNX file, run by ONNX Runtime, gives the outputs of the extracted subnet."""
        fixed: list[bool] = []

        def open_file(subnet: Subnet) -> Callable[..., Any]:
            args, kwargs = self.scored[subnet].calls[0]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                tolerance = self.family.tolerance
                file = export(self.plain[subnet], path, kwargs or args, tolerance=tolerance)
                fixed.append(not file.dynamic_batch)
                return load_exported(path)

        def expected(subnet: Subnet) -> list[Any]:
            run = _run(self.plain[subnet])
            return [run(*args, **kwargs) for args, kwargs in self.scored[subnet].calls]

        subnets = self.shipped[-self._converted :]
        cell = self._largest_difference(open_file, subnets, expected, lambda: any(fixed))
        return Cell(cell.ok, f"{cell.value}, fixed batch" if any(fixed) else cell.value)

    def _largest_difference(
        self,
        runs: Callable[[Subnet], Callable[..., Any]],
        subnets: Sequence[Subnet],
        expected: Callable[[Subnet], list[Any]],
        fixed_batch: Callable[[], bool] = bool,
    ) -> Cell:
        worst, allowed = 0.0, self.family.tolerance
        for subnet in subnets:
            run, outputs = runs(subnet), expected(subnet)
            calls = self.scored[subnet].calls
            assert len(outputs) == len(calls) > 1
            size = rows(calls[0])
            for (args, kwargs), output in zip(calls, outputs, strict=True):
                if fixed_batch() and rows((args, kwargs)) != size:
                    continue
                gap = difference(plain_output(output), plain_output(run(*args, **kwargs)))
                worst = max(worst, gap.relative)
                allowed = max(allowed, default_tolerance(tensors_of(output)))
        return Cell(worst <= allowed and self._spread() > 1e-3, f"{worst:.1g}")

    def _spread(self) -> float:
        """Return how far outputs differ by sample: where all are the same, nothing is compared."""
        outputs = [scored.outputs[0] for scored in self.scored.values()]
        return max(float(tensors_of(output)[0].std(0).max()) for output in outputs)

    def macs(self) -> Cell:
        """The measure is what torch's counter counts in the extracted subnet, on one sample."""
        told, counted = self._measured("macs"), {}
        for subnet in self.shipped:
            args, kwargs = tree_map(
                lambda x: x[:1] if isinstance(x, torch.Tensor) else x, self.scored[subnet].calls[0]
            )
            counted[subnet] = flops(self.plain[subnet], *args, **kwargs) // 2
        return self._equal(told, counted)

    def params(self) -> Cell:
        """The measure is the number of distinct weights of the extracted subnet, all of which run.

        A frozen copy of the super-network has weights of other subnets too, so it does not hold.
        """
        told, counted, idle = self._measured("params"), {}, 0
        for subnet, plain in self.plain.items():
            weights = {id(p): p for p in plain.parameters()}
            counted[subnet] = sum(p.numel() for p in weights.values())
            idle += 0 if not plain.sliced else n_idle(plain, self.scored[subnet].calls)
        cell = self._equal(told, counted)
        kept = [subnet for subnet, plain in self.plain.items() if not plain.sliced]
        whole = sum(p.numel() for p in elastic_part(self.model).parameters())
        share = min(counted.values()) / whole
        value = f"{cell.value}, smallest {share:.0%} of the weights"
        if kept:
            why = getattr(self.plain[kept[0]], "unsliced_because", "no reason is told")
            value = f"{len(kept)} of {len(self.shipped)} not sliced ({why:.80})"
        if idle:
            value += f", {idle} weights do not run"
        return Cell(cell.ok and not kept and not idle, value)

    def _measured(self, name: str) -> dict[Subnet, float]:
        return {e.subnet: e.values[name] for e in self.result.history}

    def _equal(self, told: dict[Subnet, float], counted: dict[Subnet, int]) -> Cell:
        low, high = min(counted.values()), max(counted.values())
        unequal = [s for s in self.shipped if told[s] != counted[s]]
        if unequal:
            s = unequal[0]
            return Cell(False, f"{told[s]:.0f} told, {counted[s]:.0f} counted")
        return Cell(low < high, f"{low:,} to {high:,}")

    def cell(self, name: str) -> Cell:
        """Return a cell; an error is one that does not hold."""
        try:
            cell: Cell = getattr(self, name)()
        except Exception as error:
            text = " ".join(str(error).split())
            return Cell(False, f"{type(error).__name__}: {text:.300}")
        return cell


PROPERTIES = {
    "isolated": "isolated",
    "renewed": "statistics",
    "extracted": "extracted",
    "onnx": "ONNX",
    "macs": "MACs",
    "params": "params",
}


# Means of its own


@contextmanager
def recorded(model: L.LightningModule) -> Iterator[Scored]:
    """Record inputs and outputs of a module's forward passes."""
    record = Scored()

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        record.calls.append(tree_map(_copy, (args, kwargs)))
        record.outputs.append(output)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()


def rows(call: Call) -> int:
    """Return the size of a batch."""
    return next(len(x) for x in tree_leaves(call) if isinstance(x, torch.Tensor))


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


@contextmanager
def unbiased() -> Iterator[None]:
    """Let BatchNorm in training divide variances by N - 1, as its running statistics do."""
    original = F.batch_norm

    def batch_norm(x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = dict(zip(_OF_BATCH_NORM, args, strict=False)) | kwargs
        y = original(x, **named)
        if named.get("training"):
            var, mean = torch.var_mean(x, [0, *range(2, x.ndim)])
            named |= {"running_mean": mean, "running_var": var, "training": False}
            y = original(x, **named)
        return y

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = original


_OF_BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _runs(net: nn.Module, x: torch.Tensor) -> bool:
    try:
        _run(net)(x)
    except ValueError:  # of a BatchNorm that has no statistics of a subnet
        return False
    return True


def _run(net: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), evaluating(net):
            return net(*args, **kwargs)

    return run


def plain_output(output: Any) -> Any:
    """Return an object with fields as a dict of those that hold tensors; anything else as it is."""
    fields = getattr(output, "__dataclass_fields__", None)
    if fields is None:
        return output
    return {name: getattr(output, name) for name in fields if getattr(output, name) is not None}


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an output."""
    return [x for x in tree_leaves(plain_output(output)) if isinstance(x, torch.Tensor)]


def flops(net: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return what torch's counter counts in a forward pass; it sees into plain attention alone."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            evaluating(net),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            net(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def n_idle(net: nn.Module, calls: list[Call]) -> int:
    """Return how many weights lie in tensors that no gradient reaches."""
    flags = [p.requires_grad for p in net.parameters()]
    for p in net.parameters():
        p.requires_grad_(True)
        p.grad = None
    with evaluating(net), torch.enable_grad():
        args, kwargs = calls[0]
        total = sum(x.float().square().sum() for x in tensors_of(net(*args, **kwargs)))
        total.backward()
    idle = sum(p.numel() for p in net.parameters() if p.grad is None)
    for p, flag in zip(net.parameters(), flags, strict=True):
        p.requires_grad_(flag)
        p.grad = None
    return idle
