# SPDX-License-Identifier: Apache-2.0
"""The way of a batch into a network: the item that it gets, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_subnet.elasticity.parity import Call
from lightning_subnet.errors import SearchError
from lightning_subnet.training._lightning import LightningModule, is_overridden


def calibration_step(model: LightningModule) -> Callable[[Any], Any] | None:
    """Return the model's method `calibration_step`, or None if it does not have one."""
    step: Callable[[Any], Any] | None = getattr(model, "calibration_step", None)
    return step


def network_of(model: LightningModule, part: Any) -> Any:
    """Return the module that takes the input of a batch: the model, or its elastic part."""
    return model if is_overridden("forward", model) else part


def model_input(batch: Any, model: LightningModule) -> torch.Tensor:
    """Return the input of a network in a training batch: the tensor, or the first of several.

    Raises:
        SearchError: The batch has another form.
    """
    batch = _first_item(batch)
    if isinstance(batch, torch.Tensor):
        return batch
    msg = (
        f"The training batch is a {type(batch).__name__}, so the input of forward() is not known. "
        f"Give {type(model).__name__} a method calibration_step(batch) that runs the network on a "
        "batch; it recalibrates BatchNorm."
    )
    raise SearchError(msg)


def first_input(loaders: list[Any]) -> Any:
    """Return the first sample of the first batch, as `forward` would take it.

    Raises:
        SearchError: The batch has another form.
    """
    batch = _first_item(next(iter(loaders[0])))
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch[:1]
    msg = (
        f"The validation batch is a {type(batch).__name__}, so the input of forward() is not "
        "known. Set example_input_array on the module."
    )
    raise SearchError(msg)


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
