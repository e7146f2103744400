# SPDX-License-Identifier: Apache-2.0
"""A callback that makes the network of a LightningModule elastic before it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_subnet._messages import did_you_mean, listed, warn
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.channels.importance import Importance, Score
from lightning_subnet.elasticity.channels.report import ElasticReport, ElasticRow
from lightning_subnet.elasticity.protocol import Elastic
from lightning_subnet.elasticity.sorting import sort_channels
from lightning_subnet.errors import ElasticityWarning, SearchError
from lightning_subnet.supernets._elastic.network import elasticized
from lightning_subnet.supernets.elasticizing import elasticize
from lightning_subnet.training._lightning import (
    Callback,
    LightningModule,
    Trainer,
    configure_model,
    gather,
    is_overridden,
)
from lightning_subnet.training.first_batch import example_for, first_batches, gradients_of

_BATCHES = 4  # from which importance is taken, where it needs data
_SETTINGS = "_elasticized_with"


class Elasticize(Callback):
    """Make the network of a LightningModule elastic when a Trainer sets it up; see `elasticize`.

    In one Trainer with `SubnetSampling` and `SubnetSearchCallback`, in any order, it makes an
    ordinary fine-tuning the training and the search of a super-network. It runs in `setup`, where
    the module has built its network in `__init__` or `configure_model`. Elastic becomes the only
    child with weights, if `forward` or the training step calls it, else the module itself; or what
    `module=` names. The input that it is run on is what the module's `example_input_array` or else
    the first training batch gives it: its first item, or of a dict what has the names of arguments.

    A training that goes on from a checkpoint is made elastic alike, which the checkpoint is checked
    for, and not sorted again, as the order of the units is in its weights. A network that is
    elastic by the same arguments already stays as it is, so a second `fit` goes on. Validation,
    tests and predictions make it elastic, too, if no training has.

    Args:
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of `forward`
            of the module, or of its network if it has none.
        module: The name of the submodule that becomes elastic; `""`: the module itself.
        widths: As in `elasticize`, as are all that follow. Patterns of `groups=` may begin with the
            name of the submodule.
        heads: Whether the number of attention heads varies.
        depth: Whether residual blocks may be left out.
        streams: Whether the channels that residual blocks add to vary, too.
        groups: Patterns of module names; `"!pattern"` excludes. None: all.
        divisor: Numbers of channels are multiples of it.
        importance: What units are sorted by. `"taylor"` takes gradients of `training_step` on the
            first 4 training batches, `"activation"` their inputs.
        batches: Inputs for `importance="activation"`, in place of those.
        uniform: Whether all groups of a kind vary together.
        verify: Whether groups are proved.

    Attributes:
        report: What became elastic, and why not more; None until then.

    Raises:
        SearchError: In `setup`: there is no input, the network does not run on it, it is elastic by
            other means, or the processes of a training found different groups. From a checkpoint:
            it is of another structure, or was written without this callback. In the first step: the
            training does not run what is elastic.
        ElasticityError: As `elasticize`.

    Warns:
        ElasticityWarning: The first training step does not run some of what is elastic.

    Example:
        >>> import lightning as L
        >>> from lightning_subnet import Elasticize, SubnetSampling
        >>> trainer = L.Trainer(callbacks=[Elasticize(widths=(0.5, 1)), SubnetSampling()],
        ...                     logger=False, enable_checkpointing=False)
        >>> trainer.callbacks[0].report is None  # until trainer.fit(model, ...)
        True
    """

    def __init__(  # noqa: PLR0913 - those of elasticize
        self,
        *,
        example_input: Any = None,
        module: str | None = None,
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1),
        heads: bool = True,
        depth: bool = True,
        streams: bool = False,
        groups: Sequence[str] | None = None,
        divisor: int = 8,
        importance: Importance | Score | None = "l1",
        batches: Iterable[Any] = (),
        uniform: bool = False,
        verify: bool = True,
    ) -> None:
        self._example, self._module = example_input, module
        self._importance, self._batches = importance, list(batches)
        self._groups = [groups] if isinstance(groups, str) else groups
        self._settings: dict[str, Any] = {
            "widths": widths,
            "heads": heads,
            "depth": depth,
            "streams": streams,
            "divisor": divisor,
            "uniform": uniform,
            "verify": verify,
        }
        self.report: ElasticReport | None = None
        self._structure: dict[str, Any] = {}
        self._usage: _Usage | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the network elastic."""
        problem: Exception | None = None
        try:
            part = self._made_elastic(trainer, pl_module, stage)
            self.report = part.elastic_report
            self._structure = {
                "space": {k: [*v] for k, v in part.search_space().values.items()},
                "hash": elasticized(part).structure(),  # type: ignore[union-attr] # it is one
            }
        except Exception as error:  # told to all processes, as the others would wait for ever
            problem = error
        outcomes = gather(trainer, (self._structure.get("hash"), problem and f"{problem}"))
        if problem is not None:
            raise problem
        if len({*outcomes}) > 1:
            failure = next((text for _, text in outcomes if text), None)
            msg = (
                f"Elasticize failed in another process: {failure}"
                if failure
                else "Processes of this training found different groups of channels in "
                f"{type(pl_module).__name__}. Give all of them the same network, and the same "
                "input with example_input_array."
            )
            raise SearchError(msg)
        if stage == "fit":
            self._usage = _Usage(part, self.report)

    def _made_elastic(self, trainer: Trainer, module: LightningModule, stage: str) -> Any:
        """Return the part of a module that is elastic now."""
        if is_overridden("configure_model", module):
            configure_model(trainer)
        if next(module.parameters(), None) is None:
            msg = (
                f"{type(module).__name__} has no weights yet when callbacks are set up. Build the "
                "network in __init__ or configure_model, not in setup."
            )
            raise SearchError(msg)
        fitting = stage == "fit"
        settings = {**self._settings, "groups": self._groups, "importance": self._importance}
        settings = {k: repr(v) if k != "importance" else f"{v!s:.20}" for k, v in settings.items()}
        for part in module.modules():
            if elasticized(part) is None:
                if isinstance(part, Elastic):
                    msg = (
                        f"{class_name(part)} in {type(module).__name__} is elastic by itself. "
                        "Leave Elasticize out of the callbacks."
                    )
                    raise SearchError(msg)
                continue
            before = vars(part).get(_SETTINGS)
            if before is not None and before[0] != settings:
                changed = [k for k in settings if settings[k] != before[0].get(k)]
                msg = (
                    f"{class_name(part)} is elastic already, with other arguments "
                    f"({listed(changed)}). Make a new module for another Elasticize."
                )
                raise SearchError(msg)
            if before is None or before[1] or not fitting:
                return part
        return self._elasticize(trainer, module, settings, fitting=fitting)

    def _elasticize(
        self, trainer: Trainer, module: LightningModule, settings: Any, *, fitting: bool
    ) -> Any:
        batches: list[Any] = []

        def batch() -> Any:
            return (batches or first_batches(trainer, module))[0]

        importance, inputs = self._importance, self._batches
        if trainer.ckpt_path is not None:
            importance = None  # the order of the units is in its weights
        if importance == "taylor" or (importance == "activation" and not inputs):
            if fitting:
                batches = first_batches(trainer, module, _BATCHES)
            else:
                importance = None
        name, part, example = self._target(module, batch)
        example = trainer.strategy.broadcast(example)
        if importance == "activation" and not inputs:
            inputs = [example_for(part, module, None, lambda b=b: b) for b in batches]  # type: ignore[misc] # b is one of its own
        if importance == "taylor":
            gradients_of(module, batches)
        elasticize(
            part,
            example,
            groups=_inside(self._groups, name),
            importance=importance,
            batches=inputs,
            **self._settings,
        )
        if importance == "taylor":
            module.zero_grad(set_to_none=True)
        ordered = importance is not None or self._importance is None or trainer.ckpt_path
        vars(part)[_SETTINGS] = (settings, bool(ordered))
        return part

    def _target(self, module: LightningModule, batch: Any) -> tuple[str, nn.Module, Any]:
        """Return what becomes elastic: its name, itself, and arguments that it takes."""
        example = self._example
        if example is None:
            example = module.example_input_array
        if self._module is not None:
            known = dict(module.named_modules())
            if self._module not in known:
                msg = (
                    f"module={self._module!r} is not a submodule of {type(module).__name__}."
                    f"{did_you_mean(self._module, known)}"
                )
                raise SearchError(msg)
            part = known[self._module]
            return self._module, part, example_for(part, module, example, batch)
        weighty = [
            (name, child)
            for name, child in module.named_children()
            if next(child.parameters(), None) is not None
        ]
        alone = len(weighty) == 1 and next(module.parameters(recurse=False), None) is None
        reason: Exception | None = None
        if alone:
            try:
                return *weighty[0], example_for(weighty[0][1], module, example, batch)
            except SearchError as error:
                reason = error
        if not is_overridden("forward", module):
            if reason is not None:
                raise reason
            msg = (
                f"{type(module).__name__} has no forward(), and {len(weighty)} children with "
                f"weights ({listed(name for name, _ in weighty)}). Name the one that is to be "
                "elastic: Elasticize(module=...)."
            )
            raise SearchError(msg)
        return "", module, example_for(module, module, example, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the structure of what is elastic."""
        return dict(self._structure)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that a checkpoint is of a training with this callback."""
        if self.state_key in checkpoint.get("callbacks", {}):
            return
        if trainer.state.fn == "fit":
            msg = (
                "The checkpoint was written by a training without Elasticize, so its optimizer "
                "does not know the order of the units. Load its weights into the module "
                '(model.load_state_dict(torch.load(path)["state_dict"])), and train without '
                "ckpt_path."
            )
            raise SearchError(msg)
        if self._importance is not None:
            part = next(m for m in pl_module.modules() if elasticized(m) is not None)
            sort_channels(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the structure is that of a checkpoint.

        Raises:
            SearchError: It is another one.
        """
        if not self._structure or state_dict.get("hash") == self._structure["hash"]:
            return
        before, now = state_dict.get("space", {}), self._structure["space"]
        changed = [
            f"{name}: {before.get(name, 'absent')} there, {now.get(name, 'absent')} here"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
        where = "; ".join(changed[:2]) or "the same choices of other channels"
        more = f" ({len(changed)} choices differ)" if len(changed) > 2 else ""  # noqa: PLR2004 - as shown
        msg = (
            f"The checkpoint is of a network that was elastic in another way: {where}{more}. "
            "Give Elasticize the arguments, and the module the network, that it was written with."
        )
        raise SearchError(msg)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note in the first step which layers have gradients."""
        if self._usage is not None:
            self._usage.note()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Note in the first step which layers have gradients, of all subnets."""
        if self._usage is not None:
            self._usage.note()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check after the first step that it ran what is elastic."""
        usage, self._usage = self._usage, None
        if usage is not None:
            usage.check(pl_module)


class _Usage:
    """Which of the elastic layers a training step runs: those that get gradients.

    Args:
        part: The elastic network.
        report: What of it is elastic.
    """

    def __init__(self, part: nn.Module, report: ElasticReport | None) -> None:
        self._part = part
        self._rows = () if report is None else report.elastic
        self._run: set[str] = set()
        self._largest = False

    def note(self) -> None:
        """Note what has gradients."""
        part: Any = self._part
        self._largest |= part.active_subnet in (None, part.search_space().largest)
        self._run |= {name for name, p in part.named_parameters() if p.grad is not None}

    def check(self, module: LightningModule) -> None:
        """Raise if nothing that is elastic has run; warn if some of it has not."""
        weights = {name for name, p in self._part.named_parameters() if p.requires_grad}
        own = {row.name: _of(row, weights) for row in self._rows}
        rows = [name for name, names in own.items() if names]
        idle = [name for name in rows if not own[name] & self._run]
        name = type(module).__name__
        if rows and len(idle) == len(rows):
            msg = (
                f"The training_step of {name} does not run what is elastic in "
                f"{class_name(self._part)}: none of it got a gradient. Let it call the network "
                "that forward() calls, or name what it calls: Elasticize(module=...)."
            )
            raise SearchError(msg)
        if idle and self._largest:
            msg = (
                f"The training_step of {name} does not run some of what is elastic in "
                f"{class_name(self._part)}: {listed(idle, limit=3)} got no gradients. Leave them "
                'out with Elasticize(groups=["!..."]), or let the step run them.'
            )
            warn(msg, ElasticityWarning)


def _of(row: ElasticRow, weights: set[str]) -> set[str]:
    return {name for name in weights for layer in row.layers if name.startswith(f"{layer}.")}


def _inside(patterns: Sequence[str] | None, name: str) -> list[str] | None:
    """Return patterns without the name of the submodule before them."""
    if patterns is None:
        return None
    result = []
    for pattern in patterns:
        excludes = pattern.startswith("!")
        bare = pattern.removeprefix("!").removeprefix(f"{name}." if name else "")
        result.append(f"!{bare}" if excludes else bare)
    return result
