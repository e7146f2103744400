# SPDX-License-Identifier: Apache-2.0
"""Which groups of channels and which blocks of a network become choices, with which values."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.discovery import ChannelGroup, Discovery
from lightning_subnet.elasticity.channels.report import ElasticReport, ElasticRow
from lightning_subnet.elasticity.channels.slices import Count, Slices
from lightning_subnet.elasticity.channels.tying import alike, tied
from lightning_subnet.elasticity.channels.verification import Trial, likely_counts, prove
from lightning_subnet.errors import ElasticityError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.supernets._blocks.skips import Skips
from lightning_subnet.supernets._elastic.network import Varies

_OF_HEADS = re.compile(r"head_?s|all_head|attn|inner|split")  # attributes that count heads


class Patterns:
    """Which modules may become elastic.

    Args:
        model: The network.
        patterns: Patterns of module names; None: all.

    Raises:
        ElasticityError: A pattern matches no module.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] | None) -> None:
        given = [patterns] if isinstance(patterns, str) else list(patterns or [])
        self._without = [p[1:] for p in given if p.startswith("!")]
        self._with = [p for p in given if not p.startswith("!")]
        names = [name for name, _ in model.named_modules() if name]
        for pattern in (*self._with, *self._without):
            if not fnmatch.filter(names, pattern):
                hint = did_you_mean(pattern, names)
                msg = (
                    f"groups= has {pattern!r}, which matches no module of {class_name(model)}."
                    f"{hint} Its modules are {listed(names, limit=6)}."
                )
                raise ElasticityError(msg)

    def __call__(self, name: str) -> bool:
        """Return whether a module, or one around it, is meant and none is excluded."""
        parts = name.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]

        def any_of(patterns: list[str]) -> bool:
            return any(fnmatch.fnmatchcase(n, p) for n in around for p in patterns)

        return (not self._with or any_of(self._with)) and not any_of(self._without)


@dataclass
class Candidate:
    """A group of channels on its way into the space."""

    group: ChannelGroup
    kind: str
    name: str
    layers: tuple[str, ...]
    params: float
    macs: float
    block: str | None
    values: tuple[int, ...] = ()
    counts: tuple[Count, ...] = ()
    verified: bool = False
    reason: str = ""


class Plan:
    """What of a network becomes elastic.

    Args:
        model: The network.
        discovery: Its groups of channels.
        skips: Its residual blocks.
        patterns: Which modules are meant.
    """

    def __init__(
        self, model: nn.Module, discovery: Discovery, skips: Skips, patterns: Patterns
    ) -> None:
        self.model, self.discovery, self.skips, self.patterns = model, discovery, skips, patterns
        self.kept_blocks: list[str] = []
        self.blocks_refused: dict[str, str] = dict(skips.refused)
        self.slices = Slices([])
        self.choices: list[Varies] = []
        self.modules = dict(model.named_modules())
        self._sizes = {n: p.numel() for n, p in model.named_parameters()}
        self._smallest: float | None = None
        names: dict[str, int] = {}
        self.candidates = [self._candidate(group, names) for group in discovery.groups]

    def _candidate(self, group: ChannelGroup, names: dict[str, int]) -> Candidate:
        tensors = list(dict.fromkeys(name for name, _ in group.axes))
        layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
        inside = [b for b in self.skips.residual if all(_lies_in(layer, b) for layer in layers)]
        crosses = any(
            any(_lies_in(layer, b) for layer in layers) and b not in inside
            for b in self.skips.residual
        )
        makers = [
            name
            for name, dim in group.axes
            if (name, dim) not in group.readers and name in self.discovery.macs
        ]
        given = [name for name, dim in group.axes if (name, dim) not in group.readers]
        tensor = (makers or given or tensors)[0].partition(".parametrizations.")[0]
        maker = tensor if tensor in self.modules else tensor.rpartition(".")[0] or tensor
        dims = {self._ndim(name) for name in makers}
        kind = "width"
        if not group.norms and group.spreads and dims <= {2}:
            # Also where blocks share a bias of as many heads, and so cross their borders.
            kind, maker = "heads", maker.rpartition(".")[0] or maker
        elif group.norms or crosses:
            kind = "stream"
        name = f"{kind}.{maker}"
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        total = sum(self._sizes.values()) or 1
        macs = sum(self.discovery.macs.values()) or 1
        return Candidate(
            group, kind, name, layers,
            sum(self._sizes.get(n, 0) for n in tensors) / total,
            sum(self.discovery.macs.get(n, 0) for n in tensors) / macs,
            next((b for b in inside if b in self.skips.names), None),
        )  # fmt: skip

    def _ndim(self, name: str) -> int:
        return self.model.get_parameter(name).ndim

    def choose(
        self, widths: Sequence[float], divisor: int, *, heads: bool, depth: bool, streams: bool
    ) -> None:
        """Set the values of each group, or the reason why it has none."""
        off = {"heads": (heads, "heads=False"), "stream": (streams, "streams=False")}
        for c in self.candidates:
            wanted, why = off.get(c.kind, (True, ""))
            if not wanted:
                c.reason = why
            elif not self.patterns(c.layers[0]):
                c.reason = "groups= leaves it out"
            else:
                c.values = _values(c.group, widths, 1 if c.kind == "heads" else divisor)
                if len(c.values) == 1:
                    c.reason = f"{c.group.units} units have one value after rounding"
        for name in self.skips.names:
            if not depth:
                self.blocks_refused[name] = "depth=False"
            elif not self.patterns(name):
                self.blocks_refused[name] = "groups= leaves it out"
            else:
                self.kept_blocks.append(name)

    def prove(self, trial: Trial) -> None:
        """Prove each group, and all of them at once."""
        for c in self.candidates:
            if not c.reason:
                counts, c.reason = prove(trial, c.group, c.values)
                c.counts, c.verified = tuple(counts), not c.reason
        self._tie(trial)
        self._settle()
        together: list[Candidate] = []
        for several in (False, True):  # all at once; one by one if that fails
            together = []
            for c in self.candidates:
                if c.reason:
                    continue
                together.append(c)
                if several and not self._work_together(trial, together):
                    c.reason, c.verified = "it fails together with other groups", False
                    together.remove(c)
            if several or not together or self._work_together(trial, together):
                break

    def _tie(self, trial: Trial) -> None:
        """Let groups that fail alone vary with those of other layers, where that works."""
        failing = {id(c.group): c for c in self.candidates if len(c.values) > 1 and c.reason}
        for several in alike(c.group for c in failing.values()):
            group = tied(several)
            first, *others = (failing[id(g)] for g in several)
            counts, reason = prove(trial, group, first.values)
            if not reason:
                c = self._candidate(group, {})
                c.values, c.counts, c.verified = first.values, tuple(counts), True
                self.candidates[self.candidates.index(first)] = c
                for other in others:
                    self.candidates.remove(other)

    def _settle(self) -> None:
        """Leave an attribute that may count units of several groups to the one that means it."""
        claims: dict[tuple[str, str], list[tuple[Candidate, Count]]] = {}
        for c in self.candidates:
            for count in likely_counts(self.model, c.group) if c.reason else c.counts:
                claims.setdefault((count.module, count.name), []).append((c, count))
        for (_, name), rivals in claims.items():
            if len(rivals) == 1:
                continue
            kind = "heads" if _OF_HEADS.search(name) else "stream"
            for c, count in rivals:
                if not c.reason and not count.needed and c.kind != kind:
                    c.counts = tuple(other for other in c.counts if other is not count)

    def _work_together(self, trial: Trial, chosen: list[Candidate]) -> bool:
        """Return whether groups may be as small as they get all at once, and larger."""
        groups = [c.group for c in chosen]
        slices = _slices(chosen)
        for level in range(max(len(c.values) for c in chosen) - 1):
            n_kept = [c.values[min(level, len(c.values) - 1)] for c in chosen]
            kept = [torch.arange(n) for n in n_kept]
            dropped = [torch.arange(n, g.units) for n, g in zip(n_kept, groups, strict=True)]
            try:
                if not trial.close(trial.masked(groups, dropped), trial.sliced(slices, kept)):
                    return False
            except Exception:  # of any class: the network does not run like this
                return False
        return True

    def space(self, *, uniform: bool) -> SearchSpace | None:
        """Return the space; None if nothing varies."""
        chosen = [c for c in self.candidates if not c.reason]
        for c in chosen:
            if not c.verified:
                c.counts = likely_counts(self.model, c.group)
        self.slices = _slices(chosen)
        choices: dict[str, Choice] = {
            f"keep.{i}": Choice([0, 1]) for i in range(len(self.kept_blocks))
        }
        if uniform:
            self.choices = [*_uniform(chosen)]
            choices |= {v.name: Choice([*v.units]) for v in self.choices}
        else:
            for i, c in enumerate(chosen):
                self.choices.append(Varies(c.name, {v: (v,) for v in c.values}, (i,)))
                when: dict[str, list[int]] = {}
                if c.block in self.kept_blocks:
                    when = {f"keep.{self.kept_blocks.index(c.block)}": [1]}
                choices[c.name] = Choice(c.values, when=when)
        self._smallest = self._share_of_smallest(chosen)
        return SearchSpace(choices) if choices else None

    def _share_of_smallest(self, chosen: list[Candidate]) -> float | None:
        """Return about what share of the MACs the smallest subnet has."""
        total = sum(self.discovery.macs.values())
        if not total:
            return None
        left = {
            name: 0.0 if any(_lies_in(name, b) for b in self.kept_blocks) else float(macs)
            for name, macs in self.discovery.macs.items()
        }
        for c in chosen:
            for (name, _), places in c.group.axes.items():
                if name in left:
                    gone = places[c.values[0] :].numel() / c.group.sizes[name, _]
                    left[name] *= 1 - gone
        return sum(left.values()) / total

    def report(self) -> ElasticReport:
        """Return the report."""
        rows = []
        total = self.skips.macs
        all_macs = sum(self.discovery.macs.values()) or 1
        params = sum(self._sizes.values()) or 1
        for i, name in enumerate(self.kept_blocks):
            own = sum(n for t, n in self._sizes.items() if _lies_in(t, name))
            share = min(1.0, total.get(name, 0) / all_macs)
            rows.append(
                ElasticRow(f"keep.{i}", "depth", 1, (0, 1), (name,), own / params, share, True)
            )
        rows += [
            ElasticRow(
                c.name,
                c.kind,
                c.group.units,
                c.values,
                c.layers,
                c.params,
                c.macs,
                c.verified,
                c.reason,
            )
            for c in self.candidates
        ]
        rows += [
            ElasticRow(name, "depth", 1, (), (name,), 0.0, 0.0, verified=False, reason=reason)
            for name, reason in self.blocks_refused.items()
        ]
        known = {layer for row in rows for layer in row.layers}
        for (tensor, _), reason in self.discovery.refused.items():
            layer = tensor.rpartition(".")[0]
            if layer not in known:
                known.add(layer)
                row = ElasticRow(layer, "width", 0, (), (layer,), 0.0, 0.0, False, reason)
                rows.append(row)
        return ElasticReport(class_name(self.model), tuple(rows), self._smallest)


def _lies_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _values(group: ChannelGroup, widths: Sequence[float], divisor: int) -> tuple[int, ...]:
    """Return numbers of units, ascending; the last is the whole."""
    channels = min(places.shape[1] for places in group.axes.values())
    step = ceil(divisor / channels) if divisor > 1 else 1
    n = group.units
    values = {max(step, int(n * w / step + 0.5) * step) for w in widths}
    return (*sorted(v for v in values if v < n), n)


def _slices(chosen: list[Candidate]) -> Slices:
    counts = [
        Count(count.module, count.name, i, count.per_unit)
        for i, c in enumerate(chosen)
        for count in c.counts
    ]
    return Slices([c.group for c in chosen], counts)


def _uniform(chosen: list[Candidate]) -> Iterable[Varies]:
    """Return one choice per kind: numbers of units where all groups have as many, else shares."""
    for kind in dict.fromkeys(c.kind for c in chosen):
        of_kind = [(i, c) for i, c in enumerate(chosen) if c.kind == kind]
        numbers = tuple(i for i, _ in of_kind)
        first = of_kind[0][1]
        if all(c.values == first.values for _, c in of_kind):
            yield Varies(kind, {v: (v,) * len(of_kind) for v in first.values}, numbers)
            continue
        n = max(len(c.values) for _, c in of_kind)
        longest = next(c for _, c in of_kind if len(c.values) == n)
        units = {}
        for value in longest.values:
            share = value / longest.group.units
            units[round(share, 4)] = tuple(
                min(c.values, key=lambda v, c=c: abs(v / c.group.units - share))  # type: ignore[misc]
                for _, c in of_kind
            )
        yield Varies(kind, units, numbers)
