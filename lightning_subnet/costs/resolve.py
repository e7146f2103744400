# SPDX-License-Identifier: Apache-2.0
"""Measures by name, and measures of networks bound to a model: the meaning of a list of either.

A name stands for, in this order, a measure of that name in the list, a table of the network's own
(`exact_measures()`), and an entry of `MEASURES`. An entry is a class, made without arguments, or an
object, that has a `name` and `bind(elastic, example_input) -> Measure`; `memory.py` shows one. To
add a name, write such a file beside this and a line in the table; another package offers one by an
entry point of the group `lightning_subnet.measures`. Two attributes, where it has them, say more:
`needs_sample = False`, that no example input is needed, and `of_model = True`, that it is bound to
the whole model, with a sample as that takes it, and not to its elastic part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._registry import Registry
from lightning_subnet._torch.contexts import default_type, default_types, evaluating, random_state
from lightning_subnet._torch.inputs import arguments, sample_for
from lightning_subnet.costs.counts import Count, slices
from lightning_subnet.costs.own import OwnTables, agreeing
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import (
    CostWarning,
    MeasurementError,
    ObjectiveError,
    SearchError,
    SubnetError,
)
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.measures import Measure, NetworkMeasure, by_name

MEASURES = Registry(
    "measure",
    "lightning_subnet.measures",
    {
        "macs": "lightning_subnet.costs.counts:MACS",
        "params": "lightning_subnet.costs.counts:PARAMS",
        "size_mb": "lightning_subnet.costs.counts:SIZE_MB",
        "latency_ms": "lightning_subnet.costs.latency.latency:Latency",
    },
)


def measure_names() -> list[str]:
    """Return the names that stand for a measure of any network."""
    return MEASURES.names()


def make_measure(name: str) -> NetworkMeasure:
    """Return the measure of a name, which is not bound to a network yet.

    Raises:
        KeyError: The name is unknown.
        PluginError: The name is of another package, which cannot be imported or offers something
            else.

    Example:
        >>> make_measure("latency_ms").name
        'latency_ms'
    """
    entry: Any = MEASURES[name]
    measure = entry() if isinstance(entry, type) else entry
    if isinstance(measure, NetworkMeasure) and measure.name == name:
        return measure
    reason = f"is {entry!r:.80}, which has another name or no bind(elastic, example_input)"
    raise MEASURES.unusable(name, reason)


def resolve(
    model: Any,
    measures: Iterable[str | Measure | NetworkMeasure],
    names: Iterable[str] = (),
    sample: Callable[[], Any] = lambda: None,
    *,
    error: type[SubnetError] = ObjectiveError,
    hint: str = "Give others as objects in measures=[...].",
    also: Iterable[str] = (),
) -> dict[str, Measure]:
    """Return the measures of a model by name, those of networks bound to it.

    Args:
        model: A super-network or a module around one; a space or None, if there is no network.
        measures: Measures, and names of measures.
        names: More names; those that `measures` has already do not count twice.
        sample: Returns one sample as `model` takes it, or None; called if a measure needs it.
        error: The class that is raised.
        hint: What to write in place of an unknown name: a sentence.
        also: Names of measures that the caller has besides, for the message.

    Returns:
        Measures that were bound before, then those of networks, then those by name, exact ones
        last. Exact ones by name have measured the largest subnet, so an input that does not fit
        shows here.

    Raises:
        SubnetError: Of the class `error`: a name is unknown, or a measure needs a network and there
            is none.
        ObjectiveError: An item is not a measure, or two have one name.
        SearchError: There is no elastic part in the model, or no sample for a count.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> net = ElasticMobileNetV3.tiny(n_classes=10)
        >>> params = resolve(net, ["params"])["params"]
        >>> params.unit, params.exact, params.vectorised
        ('', True, True)
    """
    items = list(measures)
    objects = [item for item in items if not isinstance(item, str)]
    by_name(objects)  # which refuses what is not a measure
    texts = [item for item in items if isinstance(item, str)]
    present = {*texts, *(item.name for item in objects)}
    lookups = [*texts, *(name for name in dict.fromkeys(names) if name not in present)]
    binding = _Binding(model, sample, error)
    options = [*(item.name for item in objects), *also, *binding.names()]
    for name in lookups:
        if binding.part is None and name in MEASURES:
            raise binding.without_network(name)
        if name not in options:
            whose = "a space" if binding.part is None else type(binding.part).__name__
            msg = f"{name!r} is not a measure of {whose}.{did_you_mean(name, options)} "
            raise error(f"{msg}Known: {listed(options)}. {hint}")
    result = [item for item in objects if isinstance(item, Measure)]
    result += [binding.bind(item) for item in objects if not isinstance(item, Measure)]
    result += sorted((binding.named(name) for name in lookups), key=lambda measure: measure.exact)
    return by_name(result)


def with_sample(model: Any, example_input: Any) -> tuple[Any, Any]:
    """Return what measures are bound to, and one sample as that takes it.

    A sample that is passed is for the super-network itself, not for a module around it; the
    `example_input_array` of a module is as that module takes it.

    Args:
        model: A super-network or a module around one; a space or None, if there is no network.
        example_input: What the caller passed, or None.
    """
    sample = sample_for(model, example_input)
    of_part = isinstance(model, nn.Module) and (example_input is not None or sample is None)
    return elastic_part(model) if of_part else model, sample


def part_with_sample(model: Any, example_input: Any, *measures: Any) -> tuple[nn.Module, Any]:
    """Return the elastic part of a model, and one sample as that takes it, or None.

    Args:
        model: A super-network or a module around one, whose `example_input_array` comes last: it
            is run, to see what the part gets of it.
        example_input: What the caller passed, for the super-network itself, or None.
        *measures: Their `input` comes first, for the super-network itself.

    Raises:
        SearchError: There is no elastic part in the model, or more than one.

    Example:
        >>> from lightning_subnet.supernets import ElasticMobileNetV3
        >>> class Images(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = ElasticMobileNetV3.tiny()
        ...         self.example_input_array = torch.zeros(1, 8, 8)
        ...     def forward(self, x):
        ...         return self.net(x.unsqueeze(1))
        >>> part, (sample,) = part_with_sample(Images(), None)
        >>> type(part).__name__, sample.shape
        ('ElasticMobileNetV3', torch.Size([1, 1, 8, 8]))
    """
    inputs = (getattr(measure, "input", None) for measure in measures)
    passed = next((x for x in (*inputs, example_input) if x is not None), None)
    of_model = getattr(model, "example_input_array", None)
    binding = _Binding(model, lambda: of_model, ObjectiveError)
    return binding.part, binding.sample_of_part if passed is None else passed


@dataclass(frozen=True)
class ValidationSample:
    """A sample from validation data, whose batches need not begin with what `forward` takes.

    Args:
        of_model: Returns one, as the model takes it.
        call_of_part: Returns positional and keyword arguments that the elastic part gets of a
            sample in a validation, or None where that is not seen.
    """

    of_model: Callable[[], Any]
    call_of_part: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None]

    def __call__(self) -> Any:
        """Return one sample, as the model takes it, or as near to that as can be known."""
        return self.of_model()


class _Binding:
    """A model to which measures are bound: its elastic part, its tables, and one sample.

    Attributes:
        part: The elastic part; None if there is no network.
        runs: Whether the model has a forward pass around that of the part.
    """

    def __init__(self, model: Any, sample: Callable[[], Any], error: type[SubnetError]) -> None:
        self.model, self._sample, self._error = model, sample, error
        self.part: Any = elastic_part(model) if isinstance(model, nn.Module) else None
        self.runs = self.part is not model and _has_forward(model)
        self.own = OwnTables(self.part)
        self._called = True  # the part, with the sample of the model

    @property
    def guesses(self) -> bool:
        """Whether the sample can only come from data, of which forward() may take another part."""
        return getattr(self.model, "example_input_array", self) is None

    def names(self) -> list[str]:
        """Return all names of measures of the network."""
        return (
            [] if self.part is None else list(dict.fromkeys([*MEASURES.names(), *self.own.tables]))
        )

    def bind(self, measure: NetworkMeasure) -> Measure:
        """Return a measure of networks, bound to this one."""
        if self.part is None:
            raise self.without_network(measure.name)
        of_model = getattr(measure, "of_model", False) and self.runs
        sample = getattr(measure, "input", None)
        needs_sample = getattr(measure, "needs_sample", True)
        if getattr(measure, "takes_sample", False):  # to see what slicing keeps
            needs_sample = needs_sample or not callable(getattr(self.part, "extract", None))
        if sample is None and needs_sample:
            sample = self.sample if of_model else self.sample_of_part
        return measure.bind(self.model if of_model else self.part, sample)

    def named(self, name: str) -> Measure:
        """Return the measure of a name; an exact one has measured the largest subnet."""
        table = self.own.tables.get(name)
        measure = self.bind(make_measure(name)) if table is None else self._compared(table)
        if measure.exact:
            space = self.part.search_space()
            measure.evaluate(space, space.indices([space.largest]))
        return measure

    def _compared(self, table: Measure) -> Measure:
        """Return a table of the network's own, if it is what is counted for the sample."""
        entry: Any = make_measure(table.name) if table.name in MEASURES else None
        if not table.exact or not isinstance(entry, Count):
            return table  # nothing is counted under this name
        if not entry.needs_sample:
            whole = entry.takes_sample and not slices(self.part, self._sample_to_slice())
            return table if whole else agreeing(self.own, self.bind(entry))
        try:
            if (given := self._given) is not None:
                return agreeing(self.own, entry.bind(self.part, given), given)
            if self.sample is None:
                return table  # of the input that the network's sizes name
            counted = self.bind(entry)
            return agreeing(self.own, counted, self.sample_of_part, around=self.runs)
        except (SearchError, MeasurementError) as error:
            if not self.guesses:
                raise
            warn(
                f"{table.name!r} of {type(self.part).__name__} is for the input that its "
                f"configuration names, and not for the validation data: {error} "
                f"Set example_input_array of {type(self.model).__name__}.",
                CostWarning,
            )
            return table

    def _sample_to_slice(self) -> Any:
        return None if callable(getattr(self.part, "extract", None)) else self.sample_of_part

    @cached_property
    def _given(self) -> Any:
        """What a validation gives the part, if that is other than a guess of the model's sample."""
        if not self.guesses or not isinstance(self._sample, ValidationSample):
            return None
        call = self._sample.call_of_part()
        if call is None or not all(isinstance(x, _PLAIN) for x in tree_leaves(call)):
            return None  # what holds a state, such as a cache, is no longer as it was
        given = _sample_of(self.part, *call)
        try:
            guess = self.sample_of_part
        except SearchError:
            return given
        same = _sizes(given) == _sizes(guess)
        return None if same and self._called else given

    def without_network(self, name: str) -> SubnetError:
        """Return the error of a measure of networks where there is no network."""
        there = "a space has none" if isinstance(self.model, SearchSpace) else "there is none"
        msg = f"{name!r} measures networks, and {there}. Pass the super-network as model=."
        return self._error(msg)

    @cached_property
    def sample(self) -> Any:
        """One sample, as the model takes it."""
        return self._sample()

    @cached_property
    def sample_of_part(self) -> Any:
        """One sample as the elastic part takes it, which the model may have prepared."""
        if not self.runs or self.sample is None:
            return self.sample
        calls: list[Any] = []
        self._called = False
        hook = self.part.register_forward_pre_hook(
            lambda _, args, named: calls.append(_sample_of(self.part, args, named)),
            with_kwargs=True,
        )
        args, named = arguments(self.model, self.sample)
        try:
            for dtype in default_types(self.model):
                # Of a sample that does not fit, the measure tells.
                with (
                    evaluating(self.model),
                    torch.no_grad(),
                    random_state(),
                    default_type(dtype),
                    suppress(Exception),
                ):
                    self.model(*args, **named)
                if calls:
                    break
        finally:
            hook.remove()
        self._called = bool(calls)
        return calls[0] if calls and calls[0] is not None else self.sample


def _has_forward(model: Any) -> bool:
    """Return whether a module has a forward pass; a LightningModule needs none."""
    name = getattr(getattr(type(model), "forward", None), "__qualname__", "")
    return "forward" in vars(model) or name not in _NO_FORWARD


_NO_FORWARD = ("", "_forward_unimplemented", "LightningModule.forward")


_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


def _sizes(inputs: Any) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in tree_leaves(inputs)]


def _sample_of(part: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return what a network was called with, as one sample; None if there is no tensor in it."""
    leaves = [x for x in tree_leaves((args, named)) if isinstance(x, torch.Tensor)]
    if not leaves:
        return None
    args, named = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, named))
    if not named:
        return args
    if not args:
        return named
    bound = inspect.signature(part.forward).bind(*args, **named)
    if not bound.kwargs:
        return bound.args
    kinds = {p.kind for p in bound.signature.parameters.values()}
    by_name = kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return dict(bound.arguments) if by_name else None
