# SPDX-License-Identifier: Apache-2.0
"""Training a super-network: a callback that lets several subnets share each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_subnet._messages import did_you_mean
from lightning_subnet._torch.contexts import muted
from lightning_subnet.costs.resolve import resolve
from lightning_subnet.elasticity.batchnorm import frozen_statistics
from lightning_subnet.elasticity.ends import calls_of, check_ends
from lightning_subnet.elasticity.protocol import Elastic, elastic, elastic_part
from lightning_subnet.elasticity.sorting import sort_channels, sortable_part
from lightning_subnet.errors import SearchError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.measures import Measure
from lightning_subnet.training._lightning import (
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
from lightning_subnet.training.distillation import (
    DistillLoss,
    Logits,
    loss_named,
    prepared_teacher,
    taught,
)
from lightning_subnet.training.progressive_shrinking import Phase, ProgressiveShrinking
from lightning_subnet.training.sampling_rules import (
    Draw,
    Rule,
    Strata,
    check_rule,
    step_subnets,
    uniform,
)


class SubnetSampling(Callback):
    """Train with several subnets per optimizer step; their gradients are added up.

    The first subnet goes through `training_step` as Lightning calls it; the others follow on the
    same batch before the optimizer steps, one graph alive at a time. So `global_step`, schedulers,
    accumulation, clipping and mixed precision are as without the callback, and the activation
    memory is that of one subnet. Which subnets step t trains is a function of (seed, t), and of the
    schedule: equal on all ranks, and the same after a resume. Outside of training steps the largest
    subnet is in force, so validation, checkpoints and early stopping keep their meaning; BatchNorm
    statistics are those of the first subnet of each step.

    Args:
        rule: `"sandwich"`: the largest, the smallest and `n_random` others; `"random"`: `n_random`.
            `"turns"`: the sandwich over steps: the largest in each, and beside it the smallest in
            one step and a random one in each of the next `n_random`. Two passes per step instead of
            four, but more than half of the cost, as every second pass is of the largest.
            `"ranks"`: the sandwich over processes, each of which trains one subnet on its batch:
            the first process the largest, the last the smallest, the others random ones (of two
            processes the last trains the smallest and a random one by turns). A step takes no more
            time and memory than one of the largest, and gradients are averaged, not added up;
            BatchNorm statistics are those of the largest, which DDP copies to all processes.
        n_random: How many random subnets per step (of `"turns"`: per turn); None: 2.
        schedule: Which part of the space is open when; see `ProgressiveShrinking`. None: all of it.
        stratify: Random subnets come from bands of an exact cost, from each equally often, in place
            of uniformly from the space, most of which costs about the same; see `Strata`. A name
            (`"macs"`, `"params"`, `"size_mb"`) or an exact `Measure`.
        distill: In-place distillation: the subnets after the first learn from its logits instead of
            from the labels. True takes what `forward` returns (of a LightningModule without its own
            `forward`, that of its elastic part); a name takes the output of that submodule. Or a
            teacher: another network, such as a copy of the original, from whose logits all subnets
            learn, the largest too. It gets what the module gets, is moved to its device and type,
            and is in eval mode; it is no part of the module, its checkpoints and its optimizer.
            An output that is a dict has its logits under `"logits"`.
        logits: With a teacher: the name of the submodule whose output is the logits of a subnet.
            None: as `distill=True`.
        distill_loss: `"soft"`, the default: the cross entropy with the teacher's probabilities, in
            dimension 1. `"alpha"`: `alpha_divergence`. Or a function, called as
            `distill_loss(student_logits, teacher_logits)`.
        label_weight: With distillation, how much of the loss of `training_step` a student keeps. 0:
            it sees no labels (BigNAS); 1: it learns from them and from its teacher (OFA). Labels
            help while the largest subnet has little to teach, as in a short training.
        others_weight: How much the loss of each subnet after the first counts. None: 1, as
            published; with a teacher and the sandwich, so much that all of them together count as
            the first, which keeps a trained network from falling behind while it learns to be
            small (`benchmarks/holding_the_largest.py`).
        space: The space, for a module that is not elastic itself.
        activate: Called as `activate(module, subnet)`, with `space`.
        seed: The seed of the draws.
        checks: Whether the first batch of a training shows that the largest subnet does not cost
            less than the smallest, as where values stand in the wrong order: two forward passes in
            eval mode, which change nothing. An `ElasticityError` ends the training otherwise.

    Raises:
        SearchError: The rule is unknown, there are no random subnets, or arguments do not go
            together.

    References:
        Yu and Huang, Universally Slimmable Networks and Improved Training Techniques, ICCV 2019
        (sandwich rule, in-place distillation); Yu et al., BigNAS, ECCV 2020, section 3.1; Cai et
        al., Once-for-All, ICLR 2020, section 3.3 (labels and the largest network's soft labels).

    Example:
        >>> SubnetSampling(rule="sandwich", n_random=2).rule
        'sandwich'
    """

    def __init__(  # noqa: PLR0913 - each technique is one argument, and most are left out
        self,
        rule: Rule = "sandwich",
        *,
        n_random: int | None = None,
        schedule: ProgressiveShrinking | None = None,
        stratify: str | Measure | None = None,
        distill: bool | str | nn.Module = False,
        logits: str | None = None,
        distill_loss: str | DistillLoss | None = None,
        label_weight: float = 0.0,
        others_weight: float | None = None,
        space: SearchSpace | None = None,
        activate: Callable[[Any, Subnet], object] | None = None,
        seed: int = 0,
        checks: bool = True,
    ) -> None:
        self.n_random = check_rule(rule, n_random)
        _check_together(rule, space, activate, distill, distill_loss, label_weight)
        _check_teaching(distill, logits, others_weight)
        if schedule is not None and not isinstance(schedule, ProgressiveShrinking):
            msg = (
                f"schedule={schedule!r:.60} is not a schedule. "
                "Give a ProgressiveShrinking({...})."
            )
            raise SearchError(msg)
        if stratify is not None and not isinstance(stratify, str | Measure):
            msg = (
                f"stratify={stratify!r:.60} is not an exact cost. "
                "Give 'macs', 'params' or a Measure."
            )
            raise SearchError(msg)
        self.rule = rule
        self.schedule = schedule
        self.stratify = stratify
        self.seed = seed
        self.label_weight = label_weight
        self.checks = checks
        self.others_weight = others_weight
        self._teacher = distill if isinstance(distill, nn.Module) else None
        self._distill = distill if self._teacher is None else (logits or True)
        self._distill_loss = loss_named(distill_loss)
        self._built_in_loss = distill_loss is None or isinstance(distill_loss, str)
        self._attachment = (space, activate)
        self._part: Elastic | None = None
        self._space: SearchSpace | None = None
        self._measure: Measure | None = None
        self._opened: dict[Phase | None, tuple[SearchSpace | None, Draw]] = {}
        self._ranks = (0, 1)
        self._step: tuple[Any, int] | None = None
        self._subnets: list[Subnet] = []
        self._logits: Logits | None = None
        self._watch = ExitStack()
        self._unchecked = False
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def subnets(self, step: int, epoch: int = 0) -> list[Subnet]:
        """Return the subnets that this process trains in an optimizer step, the first first.

        Args:
            step: The optimizer step.
            epoch: Its epoch, of which a schedule in epochs needs to know.
        """
        assert self._part is not None, "the subnets are known once training has begun"
        space = self._space = self._space or self._part.search_space()  # building it takes time
        opened, draw = self._open(space, self._phase(step, epoch))
        return step_subnets(
            self.rule,
            space.largest,
            opened,
            draw,
            step=step,
            n_random=self.n_random,
            ranks=self._ranks,
        )

    def _phase(self, step: int, epoch: int) -> Phase | None:
        return None if self.schedule is None else self.schedule.phase(step=step, epoch=epoch)

    def _open(self, space: SearchSpace, phase: Phase | None) -> tuple[SearchSpace | None, Draw]:
        """Return the part of the space that is open in a phase, and a function to draw from it."""
        if phase not in self._opened:
            opened: SearchSpace | None = space
            if self.schedule is not None and phase is not None:
                opened = self.schedule.opened(space, phase)
            draw = uniform(opened or space, self.seed)
            if opened is not None and self._measure is not None:
                draw = Strata(opened, self._measure, self.seed).draw
            self._opened[phase] = opened, draw
        return self._opened[phase]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that this training can be shared, and put the largest subnet in force.

        By then `configure_model` has run, so the network is there.
        """
        space, activate = self._attachment
        if space is not None and activate is not None:
            elastic(pl_module, space=space, activate=activate)
        check_training(pl_module, trainer)
        self._ranks = (trainer.global_rank, trainer.world_size)
        if self.rule == "ranks" and trainer.world_size == 1:
            msg = (
                "rule='ranks' gives every process one subnet, and this training has one process. "
                "Use rule='sandwich', or Trainer(devices=2, strategy='ddp')."
            )
            raise SearchError(msg)
        self._part = elastic_part(pl_module)
        self._space = self._part.search_space()
        self._opened = {}
        self._measure = self._exact(pl_module)
        phases: list[Phase | None] = [None]
        if self.schedule is not None:
            self.schedule.check(self._space)
            phases = [*self.schedule.phases]
            if self.schedule.sorts:
                sortable_part(pl_module)
        for phase in phases:  # a part that cannot be drawn from is an error before training
            self._open(self._space, phase)
        self._logits = self._logits_of(pl_module) if self._distill else None
        if self._teacher is not None:
            prepared_teacher(self._teacher, pl_module)
        self._unchecked = bool(self.checks)
        self._activate_largest()

    def _exact(self, module: LightningModule) -> Measure | None:
        """Return the cost that subnets are stratified by."""
        name = self.stratify
        if not isinstance(name, str):
            return name
        hint = "Give an exact Measure: stratify=Measure(...)."
        measures = resolve(
            module, [name], sample=lambda: module.example_input_array, error=SearchError, hint=hint
        )
        return measures[name]

    def _logits_of(self, module: LightningModule) -> Logits:
        """Return the logits of the module, which come from its head."""
        option = "distill" if self._teacher is None else "logits"
        settings: dict[str, Any] = {"classes": self._built_in_loss, "option": option}
        if isinstance(self._distill, str):
            if self._distill not in dict(module.named_modules()):
                names = [name for name, _ in module.named_modules() if name]
                msg = (
                    f"{option}={self._distill!r} is not a submodule of {type(module).__name__}."
                    f"{did_you_mean(self._distill, names)} "
                    "Name the one whose output is the logits."
                )
                raise SearchError(msg)
            head, name = module.get_submodule(self._distill), repr(self._distill)
            return Logits(module, head, name, **settings)
        if is_overridden("forward", module):
            return Logits(module, None, "forward()", **settings)
        part: Any = self._part
        if part is module:
            msg = (
                f"{type(module).__name__} has no forward(), so distill=True finds no logits. "
                f"Write one that training_step calls, or name a submodule: {option}='net'."
            )
            raise SearchError(msg)
        return Logits(module, part, "forward()", **settings)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the subnets of this step and put the first in force."""
        assert self._part is not None
        self._step = (batch, batch_idx)
        self._begin_phase(trainer, pl_module, batch_idx)
        self._subnets = self.subnets(trainer.global_step, trainer.current_epoch)
        self._part.activate(self._subnets[0])
        if self._unchecked:
            self._calls = self._watch.enter_context(calls_of(self._part))
        parallel = distributed_model(trainer)
        if parallel is not None:  # gradients of all subnets are reduced together, once
            parallel.require_backward_grad_sync = False
            parallel.require_forward_param_sync = True
        if self._logits is not None:
            self._watch.enter_context(self._logits.watched())
        if self._logits is not None and self._teacher is not None:
            self._watch.enter_context(
                taught(
                    pl_module, self._teacher, self._logits, self._distill_loss, self.label_weight
                )
            )

    def _begin_phase(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Log the phase of the schedule; sort channels where one begins that asks for it."""
        step, epoch = trainer.global_step, trainer.current_epoch
        schedule, phase = self.schedule, self._phase(step, epoch)
        if schedule is None or phase is None:
            return
        module.log("shrinking_phase", float(phase.number), prog_bar=True, on_step=True)
        # A second call within the step (accumulated batches, a resume) would change no function.
        if phase.sorts and schedule.begins(phase, step=step, epoch=epoch, batch_idx=batch_idx):
            assert self._space is not None
            keep = schedule.opened(self._space, schedule.before(phase))
            sort_channels(sortable_part(module), keep=keep, optimizers=trainer.optimizers)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradients of the other subnets, then reduce over ranks."""
        assert self._part is not None
        assert self._step is not None
        in_place = self._logits is not None and self._teacher is None
        teacher = self._logits.teacher() if self._logits is not None and in_place else None
        weight = self._weight_of_others()
        with muted(pl_module), frozen_statistics(pl_module):
            for subnet in self._subnets[1:]:
                self._part.activate(subnet)
                loss = run_training_step(trainer, pl_module, *self._step)
                if self._logits is not None and teacher is not None:
                    labels = loss
                    loss = self._distill_loss(self._logits.student(), teacher)
                    if labels is not None and self.label_weight > 0:
                        loss = loss + self.label_weight * labels
                if loss is not None:
                    backward(trainer, pl_module, weight * loss if weight != 1 else loss)
        self._part.activate(self._subnets[0])  # an optimizer may call the closure again
        mean_gradients(trainer, pl_module, uneven=self.rule == "ranks")

    def _weight_of_others(self) -> float:
        if self.others_weight is not None:
            return self.others_weight
        balanced = self._teacher is not None and self.rule == "sandwich"
        return 1 / max(1, len(self._subnets) - 1) if balanced else 1.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the largest subnet in force again; after the first batch, check that it is that."""
        self._finish()
        if self._unchecked:
            self._unchecked = False
            self._check_ends(pl_module)

    def _check_ends(self, module: LightningModule) -> None:
        """Refuse a training whose largest subnet costs less than the smallest."""
        calls, self._calls = self._calls, []
        part: Any = self._part
        if calls:
            check_ends(part, *calls[0], space=self._space)
        elif module.example_input_array is not None:  # the step calls methods of the part
            check_ends(module, module.example_input_array, space=self._space)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the largest subnet in force."""
        self._finish()

    def _finish(self) -> None:
        self._watch.close()
        self._step = None
        self._activate_largest()

    def _activate_largest(self) -> None:
        if self._part is not None and self._space is not None:
            self._part.activate(self._space.largest)


def _check_together(
    rule: Rule,
    space: object,
    activate: object,
    distill: object,
    distill_loss: object,
    label_weight: float,
) -> None:
    """Refuse arguments that do not go together."""
    if (space is None) != (activate is None):
        msg = "space= and activate= go together: what may vary, and how it is put in force."
        raise SearchError(msg)
    if distill and not isinstance(distill, nn.Module) and rule not in ("sandwich", "turns"):
        msg = (
            "distill= needs rule='sandwich' or 'turns', where the largest subnet is the teacher; "
            "or give it another network as the teacher."
        )
        raise SearchError(msg)
    if distill_loss is not None and not distill:
        msg = "distill_loss= is for distillation: give distill=True, or the name of a submodule."
        raise SearchError(msg)
    if not (0 <= label_weight < math.inf) or (label_weight and not distill):
        msg = (
            f"label_weight={label_weight!r} is the share of labels beside distillation: give a "
            "finite number of at least 0, with distill=True."
        )
        raise SearchError(msg)


def _check_teaching(distill: object, logits: object, others_weight: object) -> None:
    """Refuse arguments of distillation that are none."""
    if not isinstance(distill, bool | str | nn.Module):
        msg = (
            f"distill={distill!r:.60} is not True, the name of a submodule or a network. Give "
            "distill=True, distill='net', or a module as the teacher."
        )
        raise SearchError(msg)
    if logits is not None and not isinstance(distill, nn.Module):
        msg = f"logits={logits!r:.60} goes with a teacher. Without one, name it: distill='net'."
        raise SearchError(msg)
    number = isinstance(others_weight, int | float) and not isinstance(others_weight, bool)
    if others_weight is not None and not (number and 0 < others_weight < math.inf):  # type: ignore[operator] # a number
        msg = f"others_weight={others_weight!r:.60} is not a finite number above 0."
        raise SearchError(msg)
