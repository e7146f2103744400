# SPDX-License-Identifier: Apache-2.0
"""The way of a batch into a network: the item that it gets, and the function that runs it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_subnet._torch.inputs import run_with
from lightning_subnet.elasticity.parity import Call
from lightning_subnet.elasticity.protocol import elastic_part
from lightning_subnet.errors import SearchError
from lightning_subnet.training._lightning import LightningModule, is_overridden


def calibration_step(model: LightningModule) -> Callable[[Any], Any] | None:
    """Return the model's method `calibration_step`, or None if it does not have one."""
    step: Callable[[Any], Any] | None = getattr(model, "calibration_step", None)
    return step


def network_of(model: LightningModule, part: Any) -> Any:
    """Return the module that takes the input of a batch: the model, or its elastic part."""
    return model if is_overridden("forward", model) else part


def model_input(batch: Any, model: LightningModule) -> Any:
    """Return the input of a network in a training batch, as `run_on` takes it.

    Returns:
        The tensor, or the first of several; of a dict the keyword arguments of `forward`.

    Raises:
        SearchError: The batch has another form.
    """
    network = _network(model)
    calls = inputs_in(batch, network)
    if calls:
        args, kwargs = calls[0]
        return kwargs or args[0]
    msg = (
        f"The training batch is a {_described(batch)}, so the input of forward() is not known. "
        f"Give {type(model).__name__} a method calibration_step(batch) that runs the network on a "
        "batch; it recalibrates BatchNorm."
    )
    raise SearchError(msg)


def run_on(network: Callable[..., Any], item: Any) -> Any:
    """Return the output of a network for its input in a batch, as `model_input` gives it."""
    return run_with(network, item if isinstance(item, Mapping) else (item,))


def first_input(loaders: list[Any], model: LightningModule) -> Any:
    """Return the first sample of the first batch, as `forward` takes it.

    Raises:
        SearchError: The batch has another form.
    """
    batch = next(iter(loaders[0]))
    for args, kwargs in inputs_in(batch, _network(model)):
        item = kwargs or args[0]
        tensors = [x for x in tree_leaves(item) if isinstance(x, torch.Tensor)]
        if tensors and all(x.ndim for x in tensors):
            return tree_map(lambda x: x[:1] if isinstance(x, torch.Tensor) else x, item)
    msg = (
        f"The validation batch is a {_described(batch)}, so the input of forward() is not "
        "known. Set example_input_array on the module."
    )
    raise SearchError(msg)


def inputs_in(batch: Any, network: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what of a batch a network may take as its arguments, the likeliest first.

    Of a tuple it is the first item. Of a dict it is what has the names of arguments of `forward`,
    without targets that it can do without. If none has, it is the only tensor that is no target,
    or the dict, if the first argument is called `batch` or is said to be a dict.

    Args:
        batch: A tensor, a dict, or a list or tuple of which the first item is one.
        network: The network.

    Returns:
        Positional and keyword arguments; nothing if the batch has another form.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, tokens, mask=None, labels=None):
        ...         return tokens
        >>> inputs_in({"tokens": 1, "labels": 2, "index": 3}, Net())
        [((), {'tokens': 1}), ((), {'tokens': 1, 'labels': 2})]
    """
    item = _first_item(batch)
    if isinstance(item, torch.Tensor):
        return [((item,), {})]
    if not isinstance(item, Mapping) or not item:
        return []
    try:
        parameters = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):
        return [((), dict(item))]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        named = {str(key): value for key, value in item.items()}
    else:
        named = {key: value for key, value in item.items() if key in parameters}
    if not named:
        return _unnamed(item, next(iter(parameters.values()), None))
    optional = {
        key
        for key in named
        if _TARGET.search(key) and (key not in parameters or _is_optional(parameters[key]))
    }
    without = {key: value for key, value in named.items() if key not in optional}
    return [((), kwargs) for kwargs in ([without, named] if optional and without else [named])]


def _unnamed(
    item: Mapping[Any, Any], first: inspect.Parameter | None
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what a network whose arguments have other names may take of a dict."""
    if first is None or first.kind is not first.POSITIONAL_OR_KEYWORD:
        return []
    if first.name == "batch" or "dict" in f"{first.annotation}".lower():
        return [((), {first.name: item})]
    inputs = [v for k, v in item.items() if torch.is_tensor(v) and not _TARGET.search(str(k))]
    return [((inputs[0],), {})] if len(inputs) == 1 else []


_TARGET = re.compile(r"label|target|^y$|(start|end)_positions$")


def _is_optional(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def _network(model: LightningModule) -> Any:
    """Return the module that takes the input of a batch: the model, or its elastic part."""
    if is_overridden("forward", model):
        return model
    try:
        return elastic_part(model)
    except SearchError:  # it will be said where a part is needed
        return model


def _described(batch: Any) -> str:
    item = _first_item(batch)
    inside = "" if item is batch else f" of a {type(item).__name__}"
    return f"{type(batch).__name__}{inside}"


def _first_item(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (list, tuple)) and batch else batch


def calls_of(part: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Exception | None]:
    """Return copies of the arguments with which a network is called while something runs.

    Args:
        part: The network.
        run: Something that calls it.

    Returns:
        The first calls, on the CPU, also of a call that fails; and the error that ended the run.
    """
    calls: list[Call] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(calls) < _MOST_CALLS:
            calls.append(tree_map(_on_cpu, (args, kwargs)))

    hook = part.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    except Exception as error:
        return calls, error
    finally:
        hook.remove()
    return calls, None


def few_rows(call: Call, rows: int) -> Call:
    """Return a call on the first rows of a batch; as it is, where its tensors differ in rows."""
    tensors = [x for x in tree_leaves(call) if isinstance(x, torch.Tensor)]
    counts = {len(x) if x.ndim else 0 for x in tensors}
    if len(counts) != 1 or max(counts) <= rows:
        return call
    cut: Call = tree_map(lambda x: x[:rows] if isinstance(x, torch.Tensor) else x, call)
    return cut


_MOST_CALLS = 2  # of one step


def _on_cpu(x: Any) -> Any:
    return x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x
