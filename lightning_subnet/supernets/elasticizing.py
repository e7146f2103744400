# SPDX-License-Identifier: Apache-2.0
"""A super-network out of any network: its widths, heads and blocks become choices, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_subnet._messages import listed, warn
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.discovery import discover
from lightning_subnet.elasticity.channels.importance import Importance, Score, sortable_units
from lightning_subnet.elasticity.channels.report import ElasticReport
from lightning_subnet.elasticity.channels.verification import Trial
from lightning_subnet.elasticity.protocol import elastic
from lightning_subnet.elasticity.sorting import move_channels
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.supernets._blocks.skips import Skips
from lightning_subnet.supernets._elastic.network import Elasticized, put_back
from lightning_subnet.supernets._elastic.plan import Patterns, Plan

_Net = TypeVar("_Net", bound=nn.Module)

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
    patterns = Patterns(model, groups)
    plan = Plan(model, discovery, skips, patterns)
    plan.choose(widths, divisor, heads=heads, depth=depth, streams=streams)
    if verify:
        plan.prove(Trial(model, example_input))
    space = plan.space(uniform=uniform)
    report = plan.report()
    if space is None:
        raise ElasticityError(_nothing(model, report))
    if importance is not None:
        units = sortable_units(model, plan.slices.groups, importance, batches)
        move_channels(units, optimizers)
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
