# SPDX-License-Identifier: Apache-2.0
"""Training a super-network: a callback that lets several subnets share each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet._lightning import (
    Callback,
    LightningModule,
    Trainer,
    backward,
    check_training,
    distributed_model,
    is_overridden,
    mean_gradients,
    run_training_step,
)
from lightning_subnet.elasticity.calibration import batch_norms
from lightning_subnet.elasticity.protocol import Elastic, elastic, elastic_part
from lightning_subnet.errors import SearchError, did_you_mean
from lightning_subnet.space import SearchSpace
from lightning_subnet.subnet import Subnet

Rule = Literal["random", "sandwich"]
_RULES = ("random", "sandwich")


class SubnetSampling(Callback):
    """Train with several subnets per optimizer step; their gradients are added up.

    The first subnet goes through `training_step` as Lightning calls it; the others follow on the
    same batch before the optimizer steps, one graph alive at a time. So `global_step`, schedulers,
    accumulation, clipping and mixed precision are as without the callback, and the activation
    memory is that of one subnet. Which subnets step t trains is a function of (seed, t): equal on
    all ranks, and the same after a resume. Outside of training steps the largest subnet is in
    force, so validation, checkpoints and early stopping keep their meaning; BatchNorm statistics
    are those of the first subnet of each step.

    Args:
        rule: `"sandwich"`: the largest, the smallest and `n_random` others; `"random"`: `n_random`.
        n_random: How many random subnets per step.
        distill: In-place distillation: the subnets after the first learn from its logits instead of
            from the labels. True takes what `forward` returns (of a LightningModule without its own
            `forward`, that of its elastic part); a name takes the output of that submodule.
        distill_loss: Called as `distill_loss(student_logits, teacher_logits)`; by default the cross
            entropy with the teacher's probabilities along dimension 1.
        space: What may vary, for a module that is not elastic itself.
        activate: Called as `activate(module, subnet)`, with `space`.
        seed: The seed of the draws.

    Raises:
        SearchError: An unknown rule, or no random subnets.

    References:
        Yu and Huang, Universally Slimmable Networks and Improved Training Techniques, ICCV 2019
        (sandwich rule, in-place distillation); Yu et al., BigNAS, ECCV 2020, section 3.1.

    Example:
        >>> SubnetSampling(rule="sandwich", n_random=2).rule
        'sandwich'
    """

    def __init__(
        self,
        rule: Rule = "sandwich",
        *,
        n_random: int = 2,
        distill: bool | str = False,
        distill_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        space: SearchSpace | None = None,
        activate: Callable[[Any, Subnet], object] | None = None,
        seed: int = 0,
    ) -> None:
        if rule not in _RULES:
            msg = f"rule={rule!r} is unknown.{did_you_mean(rule, _RULES)} It is one of {_RULES}."
            raise SearchError(msg)
        if isinstance(n_random, bool) or not isinstance(n_random, int) or n_random < 1:
            msg = f"n_random={n_random!r}: at least one random subnet per step is needed."
            raise SearchError(msg)
        if (space is None) != (activate is None):
            msg = "space= and activate= go together: what may vary, and how it is put in force."
            raise SearchError(msg)
        if distill and rule != "sandwich":
            msg = "distill= needs rule='sandwich': the largest subnet is the teacher."
            raise SearchError(msg)
        self.rule = rule
        self.n_random = n_random
        self.seed = seed
        self._distill = distill
        self._distill_loss = distill_loss or soft_cross_entropy
        self._given = (space, activate)
        self._part: Elastic | None = None
        self._space: SearchSpace | None = None
        self._step: tuple[Any, int] | None = None
        self._subnets: list[Subnet] = []
        self._logits: list[torch.Tensor] = []
        self._watch = ExitStack()

    def subnets(self, step: int) -> list[Subnet]:
        """Return the subnets that an optimizer step trains, the first first."""
        assert self._part is not None, "the subnets are known once training has begun"
        space = self._space = self._space or self._part.search_space()  # building it takes time
        drawn = space.sample(
            min(self.n_random, space.size), np.random.default_rng([self.seed, step])
        )
        if self.rule == "random":
            return drawn
        return list(dict.fromkeys([space.largest, space.smallest, *drawn]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that this training can be shared, and put the largest subnet in force.

        By then `configure_model` has run, so the network is there.
        """
        space, activate = self._given
        if space is not None and activate is not None:
            elastic(pl_module, space=space, activate=activate)
        check_training(pl_module, trainer)
        self._part = elastic_part(pl_module)
        self._space = self._part.search_space()
        if isinstance(self._distill, str) and self._distill not in dict(pl_module.named_modules()):
            names = [name for name, _ in pl_module.named_modules() if name]
            msg = (
                f"distill={self._distill!r} is no submodule of {type(pl_module).__name__}."
                f"{did_you_mean(self._distill, names)} Name the one whose output is the logits."
            )
            raise SearchError(msg)
        self._activate_largest()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the subnets of this step and put the first in force."""
        assert self._part is not None
        self._step = (batch, batch_idx)
        self._subnets = self.subnets(trainer.global_step)
        self._part.activate(self._subnets[0])
        self._logits = []
        parallel = distributed_model(trainer)
        if parallel is not None:  # gradients of all subnets are reduced together, once
            parallel.require_backward_grad_sync = False
            parallel.require_forward_param_sync = True
        if self._distill:
            self._watch.enter_context(self._watched(pl_module))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradients of the other subnets, then reduce over ranks."""
        assert self._part is not None
        assert self._step is not None
        teacher = self._taken_logits(pl_module) if self._distill else None
        with muted(pl_module), frozen_statistics(pl_module):
            for subnet in self._subnets[1:]:
                self._part.activate(subnet)
                loss = run_training_step(trainer, pl_module, *self._step)
                if teacher is not None:
                    loss = self._distill_loss(self._taken_logits(pl_module), teacher.detach())
                if loss is not None:
                    backward(trainer, pl_module, loss)
        self._part.activate(self._subnets[0])  # an optimizer may call the closure again
        mean_gradients(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the largest subnet in force again."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the largest subnet in force."""
        self._finish()

    def _finish(self) -> None:
        self._watch.close()
        self._step, self._logits = None, []
        self._activate_largest()

    def _activate_largest(self) -> None:
        if self._part is not None and self._space is not None:
            self._part.activate(self._space.largest)

    @contextmanager
    def _watched(self, module: LightningModule) -> Iterator[None]:
        """Keep the logits of each forward pass."""
        child: Any = None
        if isinstance(self._distill, str):
            child = module.get_submodule(self._distill)
        elif not is_overridden("forward", module):
            child = self._part
        if child is not None:
            hook = child.register_forward_hook(lambda _m, _i, out: self._logits.append(out))
            try:
                yield
            finally:
                hook.remove()
            return
        own, forward = vars(module).get("forward"), module.forward

        def remembered(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._logits.append(out)
            return out

        module.forward = remembered  # type: ignore[method-assign] # until the step is over
        try:
            yield
        finally:
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own  # type: ignore[method-assign] # as it was

    def _taken_logits(self, module: LightningModule) -> torch.Tensor:
        taken, self._logits = self._logits, []
        if len(taken) != 1 or not isinstance(taken[0], torch.Tensor):
            where = "forward()" if self._distill is True else f"{self._distill!r}"
            what = f"{len(taken)} outputs" if len(taken) != 1 else f"a {type(taken[0]).__name__}"
            msg = (
                f"Distillation needs one tensor of logits per step; {where} of "
                f"{type(module).__name__} gave {what}. "
                "Name the submodule whose output is the logits: distill='net'."
            )
            raise SearchError(msg)
        return taken[0]


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of logits with a teacher's probabilities, classes in dimension 1.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[5.0, 1.0]])).item()
        0.6931...
    """
    return F.cross_entropy(student, teacher.softmax(1))


@contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Drop what the module logs."""
    shadowed: Any = module
    shadowed.log = shadowed.log_dict = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del shadowed.log, shadowed.log_dict


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch without touching its running statistics."""
    layers: list[Any] = [*batch_norms(module)]  # those with statistics count their batches
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)
