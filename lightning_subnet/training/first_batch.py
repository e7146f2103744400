# SPDX-License-Identifier: Apache-2.0
"""What a network takes of a batch: found in the batch, or in what the training step gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_subnet._torch.contexts import evaluating, muted, random_state, same_buffers
from lightning_subnet._torch.inputs import arguments, cloned
from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import SearchError
from lightning_subnet.training._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    data_source,
    is_overridden,
    run_training_step,
    transfer,
)
from lightning_subnet.training.validation.batch_input import calls_of, few_rows, inputs_in
from lightning_subnet.training.validation.gathered import GatheredState

_ROWS = 2  # of the batch that the network is tried on


def first_batches(trainer: Trainer, module: LightningModule, n: int = 1) -> list[Any]:
    """Return the first batches of what a Trainer runs on, as steps get them.

    Random states stay as they are, so that a training draws the same batches as without it.

    Raises:
        SearchError: There is no such data before the module's own `setup`.
    """
    with random_state():
        try:
            loader = data_source(trainer).dataloader()
            batches = list(islice(_batches(loader), n))
        except Exception as error:
            msg = (
                f"The first batch cannot be had in setup() of a callback: {type(error).__name__}: "
                f"{error!s:.150}. Set example_input_array on {type(module).__name__}, or pass "
                "Elasticize(example_input=...)."
            )
            raise SearchError(msg) from error
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        return [transfer(trainer, module, batch, device=device) for batch in batches]


def _batches(loader: Any) -> Iterator[Any]:
    if isinstance(loader, CombinedLoader):
        loader = loader.flattened
    while isinstance(loader, (list, tuple, Mapping)):  # of several, the first
        loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
    return iter(loader)


def example_for(
    network: nn.Module, module: LightningModule, example: Any, batch: Callable[[], Any]
) -> Any:
    """Return arguments of a network: a tuple of positional or a dict of keyword arguments.

    Args:
        network: The network: the module, or a child of it.
        module: The module.
        example: What `forward` of the module takes, or of the network if the module does not have
            one. None: what a batch has.
        batch: Returns a batch.

    Raises:
        SearchError: The network does not run on the example, or on anything in the batch.
    """
    outer: nn.Module = module if is_overridden("forward", module) else network
    if example is not None:
        args, kwargs = arguments(module, example)
        call = _call_inside(outer, network, args, kwargs)
        if isinstance(call, Exception):
            what = "is not run by it" if outer is not network else "does not take it"
            msg = (
                f"forward() of {class_name(outer)} was given the example input, and "
                f"{class_name(network)} {what}: {type(call).__name__}: {call!s:.150}."
            )
            raise SearchError(msg) from call
        return _one_form(network, call)
    item = batch()
    for args, kwargs in inputs_in(item, outer):
        inputs = arguments(module, kwargs or args)
        call = _call_inside(outer, network, *few_rows(inputs, _ROWS))
        if not isinstance(call, Exception):
            return _one_form(network, call)
    calls = _calls_of_step(network, module, item)
    if calls:
        return _one_form(network, few_rows(calls[0], _ROWS))
    msg = (
        f"{class_name(network)} does not run on anything in a batch ({_form(item)}), and the "
        f"training_step of {type(module).__name__} does not call it. Set example_input_array to "
        "what forward() takes, or pass Elasticize(example_input=...)."
    )
    raise SearchError(msg)


def _call_inside(
    outer: nn.Module, network: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any] | Exception:
    """Return the arguments with which a pass of one network calls another, or why it does not."""

    def run() -> None:
        with same_buffers(outer), evaluating(outer), torch.no_grad(), random_state(0):
            outer(*cloned(args), **cloned(kwargs))

    calls, error = calls_of(network, run)
    if error is not None:
        return error
    return calls[0] if calls else TypeError("it was not called")


def _calls_of_step(network: nn.Module, module: LightningModule, batch: Any) -> list[Any]:
    """Return the arguments with which a training step calls a network."""
    if not module.automatic_optimization:
        return []
    state = GatheredState(module)

    def run() -> None:
        with ExitStack() as stack:
            for context in (same_buffers(module), evaluating(module), muted(module)):
                stack.enter_context(context)
            stack.enter_context(random_state(0))
            stack.enter_context(torch.no_grad())
            run_training_step(module.trainer, module, cloned(batch), 0)

    try:
        return calls_of(network, run)[0]
    finally:
        state.restore()


def _one_form(network: nn.Module, call: tuple[Any, Any]) -> Any:
    """Return arguments as a tuple of positional or a dict of keyword arguments."""
    args, kwargs = call
    if not kwargs or not args:
        return dict(kwargs) if kwargs else tuple(args)
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _form(item: Any) -> str:
    shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else type(x), item)
    return f"{shapes!r:.120}"


def gradients_of(module: LightningModule, batches: list[Any]) -> None:
    """Add the gradients of the loss on some batches to the weights of a module.

    Raises:
        SearchError: The training step returns no loss, or optimises itself.
    """
    if not module.automatic_optimization:
        msg = (
            f'importance="taylor" takes gradients of training_step, and {type(module).__name__} '
            'optimises manually. Give importance="l1".'
        )
        raise SearchError(msg)
    state = GatheredState(module)
    try:
        with same_buffers(module), evaluating(module), random_state(0), muted(module):
            for batch in batches:
                loss = run_training_step(module.trainer, module, cloned(batch), 0)
                if loss is not None:
                    loss.backward()  # type: ignore[no-untyped-call] # torch has no types for it
    finally:
        state.restore()
