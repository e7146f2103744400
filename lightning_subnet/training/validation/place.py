# SPDX-License-Identifier: Apache-2.0
"""The place of the elastic part in a model, in which a subnet of its own may stand for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_subnet.elasticity.batchnorm import Recalibrator
from lightning_subnet.training._lightning import LightningModule
from lightning_subnet.training.validation.batch_input import calibration_step, network_of, run_on

Watcher = Callable[[tuple[Any, ...]], None]
"""Gets the positional arguments of a forward pass."""


class Place:
    """The place of the elastic part in a LightningModule.

    Args:
        model: The LightningModule.
        part: Its elastic part, or the module itself.

    Attributes:
        current: The network that stands there: the elastic part, or what was put in its place.
        runs: How often it has run since it was put there; always 0 for the elastic part.
    """

    def __init__(self, model: LightningModule, part: Any) -> None:
        self.model, self.part = model, part
        self.current: Any = part
        self.runs = 0
        self._undo: Callable[[], None] | None = None
        self._watcher: Watcher | None = None
        self._hook: Any = None
        self._recalibrator = Recalibrator(model)  # of the modes in which the user left the layers

    def put(self, net: nn.Module) -> None:
        """Let a network stand in the place of the elastic part, until `restore`.

        Every module that has the part as a child gets the network as that child. Where the model is
        the elastic part itself, its `forward` is the network's meanwhile.
        """
        self.restore()
        hook = net.register_forward_pre_hook(self._count)
        owners = [
            (owner, name)
            for owner in self.model.modules()
            for name, child in owner._modules.items()
            if child is self.part
        ]
        if self.part is self.model:
            before = vars(self.model).get("forward")
            vars(self.model)["forward"] = net.__call__
        for owner, name in owners:
            owner._modules[name] = net

        def undo() -> None:
            hook.remove()
            for owner, name in owners:
                owner._modules[name] = self.part
            if self.part is self.model:
                del vars(self.model)["forward"]
                if before is not None:
                    vars(self.model)["forward"] = before

        self.current, self.runs, self._undo = net, 0, undo
        self.watch(self._watcher)

    def restore(self) -> None:
        """Let the elastic part stand there again."""
        if self._undo is not None:
            self._undo()
        self.current, self.runs, self._undo = self.part, 0, None
        self.watch(self._watcher)

    def watch(self, watcher: Watcher | None) -> Watcher | None:
        """Call something with the arguments of what stands there, before it runs.

        Args:
            watcher: Called until it is replaced; None: nothing is called any more.

        Returns:
            What was called so far.
        """
        before, self._watcher = self._watcher, watcher
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if watcher is not None:
            self._hook = self.current.register_forward_pre_hook(lambda _net, args: watcher(args))
        return before

    def _count(self, *_args: Any) -> None:
        self.runs += 1

    @property
    def root(self) -> nn.Module:
        """The module with all layers that run: the model, or what runs in its stead."""
        replaced = self.part is self.model and self.current is not self.part
        root: nn.Module = self.current if replaced else self.model
        return root

    def run(self, item: Any) -> Any:
        """Run the network on an item of `calibration_step`, or else on the input of a batch."""
        step = calibration_step(self.model)
        if step is not None:
            return step(item)
        return run_on(network_of(self.model, self.current), item)

    def recalibrate(self, items: Iterable[Any], *, max_images: int) -> int:
        """Renew the running statistics of what stands there, and return over how many samples.

        Args:
            items: What `run` takes, from training data.
            max_images: The most samples.
        """
        return self._recalibrator(items, max_images=max_images, forward=self.run, module=self.root)
