# SPDX-License-Identifier: Apache-2.0
"""A super-network out of any network: its widths, heads and blocks become choices, in one call."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._torch.fingerprints import hashed
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.discovery import ChannelGroup, Discovery, discover
from lightning_subnet.elasticity.channels.importance import Importance, Score, SortableUnits, scores
from lightning_subnet.elasticity.channels.report import ElasticReport, ElasticRow
from lightning_subnet.elasticity.channels.slices import Count, Slices, bake, release
from lightning_subnet.elasticity.channels.tying import alike, tied
from lightning_subnet.elasticity.channels.verification import Trial, likely_counts, prove
from lightning_subnet.elasticity.extraction import detached_copy
from lightning_subnet.elasticity.protocol import detach, elastic
from lightning_subnet.elasticity.sorting import Values, move_channels
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.space.choices import Choice
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.supernets._blocks.skips import Skips
from lightning_subnet.supernets.recipes import note_recipe, recipe_of

_Net = TypeVar("_Net", bound=nn.Module)

_OF_HEADS = re.compile(r"head_?s|all_head|attn|inner|split")  # attributes that count heads
_MOST = 0.9  # of the MACs in the smallest subnet: it saves nearly nothing


def elasticize(  # noqa: PLR0913 - each is one decision about the space
    model: _Net,
    example_input: Any = None,
    *,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1),
    heads: bool = True,
    depth: bool = True,
    streams: bool = False,
    groups: Sequence[str] | None = None,
    divisor: int = 8,
    importance: Importance | Score | None = "l1",
    batches: Iterable[Any] = (),
    optimizers: Iterable[torch.optim.Optimizer] = (),
    uniform: bool = False,
    verify: bool = True,
) -> _Net:
    """Make any network searchable: how wide its layers are, how many heads, which blocks.

    What belongs together is found by running the network's own code on the example (no graph, no
    list of architectures): the channels of a layer, with all that reads and normalises them; the
    heads of an attention with its queries, keys and values, where one key-value head serves several
    queries together with these; residual blocks that keep their shape. Each group is proved: the
    network without some units must give what the whole network gives if nothing reads them. One
    that fails is left out, with the reason in `model.elastic_report`.

    Subnets have the first units of each group. They are sorted by importance once, which leaves the
    whole network the same function, so that a narrow subnet begins with the units that matter.

    Args:
        model: A network of torch, timm, transformers or your own, or a LightningModule. It is
            changed in place: its weights are sorted, and classes of its layers get properties. Its
            state dict keeps its names and shapes.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`.
            None: the model's `example_input_array`.
        widths: Shares of the units that subnets may have.
        heads: Whether the number of attention heads varies.
        depth: Whether residual blocks may be left out.
        streams: Whether the channels that residual blocks add to vary, too. Their normalisations
            then see fewer channels, so narrow subnets need more training. States that a network of
            transformers hands out beside its logits have the channels of the stream, sorted, too.
        groups: Patterns of module names, as `fnmatch` takes them; `"!pattern"` excludes. None: all.
        divisor: Numbers of channels are multiples of it; heads are not rounded.
        importance: What units are sorted by: `"l1"` or `"l2"` of the weights that read them,
            `"taylor"` of the gradients that they have, `"activation"` of `batches`, a function of
            (group, tensors) that returns one number per unit, or None: they stay as they are.
        batches: Inputs for `importance="activation"`, each as `example_input` is.
        optimizers: Optimizers that exist already: their momenta are sorted with the weights.
        uniform: Whether all groups of a kind vary together, as engines that serve a network need
            it: choices are then `width`, `heads` and `stream`.
        verify: Whether groups are proved; without it, a wrong one is noticed by nobody.

    Returns:
        The same object, with `search_space()`, `activate(subnet)`, `extract(subnet)`,
        `active_subnet` and `elastic_report`. The choices are `keep.<i>` (0 or 1, blocks in running
        order), `width.<layer>`, `heads.<module>` and `stream.<layer>`; their values are numbers of
        units.

    Raises:
        SearchError: Not a module, no example, or an argument out of range.
        ElasticityError: `forward` does not take the example or depends on its values, a pattern
            matches nothing, or the network has nothing that may vary: the message says what was
            looked at, and why it was refused.

    Warns:
        ElasticityWarning: The smallest subnet has nearly all MACs of the network.

    References:
        Sukthanker et al., LLaMA-NAS (arXiv:2405.18377), and Cai et al., Once-for-All, ICLR 2020,
        section 3.3 (channels sorted by importance). Finding the groups is ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> net = elasticize(net, torch.randn(2, 4))
        >>> net.search_space().values
        {'width.0': (8, 16, 24, 32)}
        >>> net.activate(net.search_space().smallest)
        >>> net[0].weight.shape
        torch.Size([8, 4])
        >>> net.extract(net.active_subnet)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    example_input = _check(model, example_input, widths, divisor)
    put_back(model)
    discovery = discover(model, example_input)
    skips = Skips.find(model, example_input)
    patterns = _Patterns(model, groups)
    plan = _Plan(model, discovery, skips, patterns)
    plan.choose(widths, divisor, heads=heads, depth=depth, streams=streams)
    if verify:
        plan.prove(Trial(model, example_input))
    space = plan.space(uniform=uniform)
    report = plan.report()
    if space is None:
        raise ElasticityError(_nothing(model, report))
    if importance is not None:
        importances = scores(model, plan.slices.groups, importance, batches)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        move_channels(
            [
                SortableUnits(group, tensors, score)
                for group, score in zip(plan.slices.groups, importances, strict=True)
            ],
            optimizers,
        )
    plan.slices.attach(model)
    network = Elasticized(plan.slices, skips, plan.choices, plan.kept_blocks)
    elastic(model, space=space, activate=network.activate, extract=network.extract)
    vars(model)["elastic_report"] = report
    vars(model)["sortable_channels"] = partial(network.sortable_channels, model)
    if report.smallest_macs is not None and report.smallest_macs > _MOST:
        msg = (
            f"The smallest subnet of {class_name(model)} still has {report.smallest_macs:.1%} of "
            "its MACs. print(model.elastic_report) says what is elastic and what is not."
        )
        warn(msg, ElasticityWarning)
    return model


def elasticized(model: nn.Module) -> Elasticized | None:
    """Return what puts subnets of a network in force, if `elasticize` made it elastic."""
    attached: Any = getattr(vars(model).get("extract"), "__self__", None)
    owner = getattr(getattr(attached, "_extract", None), "__self__", None)
    return owner if isinstance(owner, Elasticized) else None


def _check(model: Any, example_input: Any, widths: Any, divisor: Any) -> Any:
    """Raise if an argument is wrong; return the example."""
    if not isinstance(model, nn.Module):
        msg = f"elasticize() got a {class_name(model)}, which is not an nn.Module."
        raise SearchError(msg)
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        msg = (
            f"{class_name(model)} is compiled. Elasticize the network first, and compile what "
            "comes back: torch.compile(elasticize(net, ...))."
        )
        raise SearchError(msg)
    for name, module in model.named_modules():
        if hasattr(module, "search_space") and (name or "elastic_report" not in vars(module)):
            part = f"its part {name!r} has" if name else "it has"
            msg = (
                f"{class_name(model)} already is a super-network: {part} a search_space(). Train "
                "and search it as it is; elasticize() is for networks that have none."
            )
            raise ElasticityError(msg)
    if example_input is None:
        example_input = getattr(model, "example_input_array", None)
    if example_input is None:
        msg = (
            "elasticize() needs an input that forward() takes. Pass one, as in "
            "elasticize(model, torch.randn(1, 3, 224, 224)), or set model.example_input_array."
        )
        raise SearchError(msg)
    try:
        shares = [float(w) for w in widths]
    except (TypeError, ValueError):
        shares = []
    if not shares or any(not 0 < w <= 1 for w in shares):
        msg = f"widths={widths!r:.80} are not shares of the whole: numbers above 0, up to 1."
        raise SearchError(msg)
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        msg = f"divisor={divisor!r:.80} is not a whole number from 1 on."
        raise SearchError(msg)
    return example_input


def put_back(model: nn.Module) -> None:
    """Undo an earlier call of `elasticize`; a network without one is left as it is."""
    extract = vars(model).get("extract")
    if "elastic_report" in vars(model) and extract is not None:
        model.activate(model.search_space().largest)  # type: ignore[operator] # it is elastic
        detach(model)
        release(model)
        _forget(model)


def _forget(model: nn.Module) -> None:
    for name in ("elastic_report", "sortable_channels"):
        vars(model).pop(name, None)


def _nothing(model: nn.Module, report: ElasticReport) -> str:
    """Return the message that nothing may vary."""
    by_reason: dict[str, list[str]] = {}
    for row in report.refused:
        by_reason.setdefault(row.reason, []).append(row.name)
    reasons = "; ".join(
        f"{listed(names, limit=2)}: {reason}" for reason, names in [*by_reason.items()][:4]
    )
    return (
        f"{class_name(model)} has nothing that may vary. "
        f"{reasons or 'It has no layers whose channels another layer reads, and no residual block'}"
        ". Look at widths=, divisor=, groups= and streams=, or use elastic()."
    )


class _Patterns:
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
class _Candidate:
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


@dataclass(frozen=True)
class _Varies:
    """A choice of the space.

    Attributes:
        name: Its name.
        units: By value, the number of units of each of its groups.
        groups: The numbers of its groups.
    """

    name: str
    units: Mapping[Any, tuple[int, ...]]
    groups: tuple[int, ...]


class _Plan:
    """What of a network becomes elastic.

    Args:
        model: The network.
        discovery: Its groups of channels.
        skips: Its residual blocks.
        patterns: Which modules are meant.
    """

    def __init__(
        self, model: nn.Module, discovery: Discovery, skips: Skips, patterns: _Patterns
    ) -> None:
        self.model, self.discovery, self.skips, self.patterns = model, discovery, skips, patterns
        self.kept_blocks: list[str] = []
        self.blocks_refused: dict[str, str] = dict(skips.refused)
        self.slices = Slices([])
        self.choices: list[_Varies] = []
        self.modules = dict(model.named_modules())
        self._sizes = {n: p.numel() for n, p in model.named_parameters()}
        self._smallest: float | None = None
        names: dict[str, int] = {}
        self.candidates = [self._candidate(group, names) for group in discovery.groups]

    def _candidate(self, group: ChannelGroup, names: dict[str, int]) -> _Candidate:
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
        return _Candidate(
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
            elif not any(map(self.patterns, c.layers[:1])):
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
        together: list[_Candidate] = []
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
        claims: dict[tuple[str, str], list[tuple[_Candidate, Count]]] = {}
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

    def _work_together(self, trial: Trial, chosen: list[_Candidate]) -> bool:
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
                self.choices.append(_Varies(c.name, {v: (v,) for v in c.values}, (i,)))
                when: dict[str, list[int]] = {}
                if c.block in self.kept_blocks:
                    when = {f"keep.{self.kept_blocks.index(c.block)}": [1]}
                choices[c.name] = Choice(c.values, when=when)
        self._smallest = self._share_of_smallest(chosen)
        return SearchSpace(choices) if choices else None

    def _share_of_smallest(self, chosen: list[_Candidate]) -> float | None:
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


def _slices(chosen: list[_Candidate]) -> Slices:
    counts = [
        Count(count.module, count.name, i, count.per_unit)
        for i, c in enumerate(chosen)
        for count in c.counts
    ]
    return Slices([c.group for c in chosen], counts)


def _uniform(chosen: list[_Candidate]) -> Iterable[_Varies]:
    """Return one choice per kind: numbers of units where all groups have as many, else shares."""
    for kind in dict.fromkeys(c.kind for c in chosen):
        of_kind = [(i, c) for i, c in enumerate(chosen) if c.kind == kind]
        numbers = tuple(i for i, _ in of_kind)
        first = of_kind[0][1]
        if all(c.values == first.values for _, c in of_kind):
            yield _Varies(kind, {v: (v,) * len(of_kind) for v in first.values}, numbers)
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
        yield _Varies(kind, units, numbers)


@dataclass
class Elasticized:
    """Puts subnets of an elasticized network in force, and cuts them out.

    Attributes:
        slices: What may be dropped.
        skips: The residual blocks.
        choices: The choices of numbers of units.
        blocks: The blocks that may be left out, in the order of `keep.<i>`.
    """

    slices: Slices
    skips: Skips
    choices: list[_Varies]
    blocks: list[str]

    def activate(self, net: nn.Module, subnet: Subnet) -> None:
        """Put a subnet in force."""
        if self.blocks:
            self.skips.put(net, self._skipped(subnet))
        self.slices.put(net, self._kept(subnet))

    def _kept(self, subnet: Subnet) -> list[int]:
        kept = [group.units for group in self.slices.groups]
        for choice in self.choices:
            for i, units in zip(choice.groups, choice.units[subnet[choice.name]], strict=True):
                kept[i] = units
        return kept

    def extract(self, net: nn.Module, subnet: Subnet) -> nn.Module:
        """Return a subnet as a network of its own, of the classes that the network had."""
        before = getattr(net, "active_subnet", None)
        self.activate(net, subnet)
        try:
            lists: dict[str, set[str]] = {}
            if self.blocks:
                plain, lists = self.skips.extracted(net, self._skipped(subnet), remove=True)
            else:
                plain = detached_copy(net, {})
                detach(plain)
        finally:
            self.activate(net, net.search_space().largest if before is None else before)  # type: ignore[operator] # it is elastic
        bake(plain)
        _forget(plain)
        kept, skipped = self._kept(subnet), self._skipped(subnet)
        indices, counted = self.slices.indices(kept), self.slices.counted(kept)
        note_recipe(plain, recipe_of(indices, counted, self.skips, skipped, lists))
        return plain

    def structure(self) -> str:
        """Return a hash of what varies: equal ones have the same groups, of the same entries."""
        groups = [
            [[name, dim, group.axes[name, dim]] for name, dim in sorted(group.axes)]
            for group in self.slices.groups
        ]
        choices = [[c.name, [*c.units.items()], c.groups] for c in self.choices]
        return hashed([groups, choices, self.blocks])

    def sortable_channels(self, net: nn.Module, keep: Values) -> list[SortableUnits]:
        """Return the groups, for `sort_channels`; see `Sortable`."""
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        importances = scores(net, self.slices.groups, "l1")
        bounds: dict[int, tuple[int, ...]] = {}
        for choice in self.choices:
            values = keep.get(choice.name, ())
            for place, i in enumerate(choice.groups):
                bounds[i] = tuple(choice.units[v][place] for v in values)
        return [
            SortableUnits(group, tensors, score, bounds.get(i, ()))
            for i, (group, score) in enumerate(zip(self.slices.groups, importances, strict=True))
        ]

    def _skipped(self, subnet: Subnet) -> list[str]:
        return [name for i, name in enumerate(self.blocks) if not subnet[f"keep.{i}"]]
