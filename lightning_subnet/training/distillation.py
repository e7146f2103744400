# SPDX-License-Identifier: Apache-2.0
"""Distillation: the losses by which subnets learn from a teacher, and where logits come from.

The student's classes are in dimension 1 throughout, as `cross_entropy` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet._torch.contexts import shadowed
from lightning_subnet._torch.names import class_name
from lightning_subnet.errors import SearchError

DistillLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of logits with a teacher's probabilities, classes in dimension 1.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[5.0, 1.0]])).item()
        0.6931...
    """
    return F.cross_entropy(student, teacher.softmax(1))


def alpha_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    alpha: float | Sequence[float] = (-1.0, 1.0),
    clip: float = 5.0,
) -> torch.Tensor:
    r"""Return the alpha-divergence of a student from a teacher; of several alphas the greatest.

    With probabilities :math:`p` of the teacher and :math:`q` of the student it is
    :math:`D_\alpha = \frac{1}{\alpha (\alpha - 1)} \sum_i q_i [(p_i / q_i)^\alpha - 1]`, which is
    KL(p, q) in the limit of alpha = 1 and KL(q, p) in that of 0. A positive alpha punishes a
    student that has too little where the teacher has much, a negative one that it has much where
    the teacher has little; the greater of two, taken for each sample, punishes both.

    Powers of p / q are clipped, in the value and in the gradient
    :math:`-\frac{1}{\alpha} \sum_i q_i (p_i / q_i)^\alpha \nabla \log q_i`, which is otherwise that
    of the value. Where a power is clipped the gradient goes on to push, as in the authors' code,
    and so is not that of the clipped value. At alpha = 1 nothing is clipped, as the gradient is
    bounded; at alpha = 0 the ratio itself is.

    Args:
        student: Logits (n, n_classes, ...).
        teacher: Logits of the same shape; no gradient flows into them.
        alpha: One or several.
        clip: The most that a power of p / q may be; `math.inf` does not clip.

    Returns:
        The mean over all dimensions but 1, a scalar.

    Raises:
        SearchError: The shapes differ, there is no alpha, or the clip is not positive.

    References:
        Wang et al., AlphaNet: Improved Training of Supernets with Alpha-Divergence, ICML 2021,
        Algorithm 1 (the greater of two, clipped); its experiments have alphas -1 and 1, clip 5.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
        >>> round(alpha_divergence(student, teacher, alpha=2).item(), 4)  # half of chi-squared
        0.125
    """
    alphas = [alpha] if isinstance(alpha, int | float) else [*alpha]
    if not alphas or not all(math.isfinite(a) for a in alphas) or not clip > 0:
        msg = f"alpha={alpha!r} and clip={clip!r}: give finite alphas, such as (-1, 1), and clip>0."
        raise SearchError(msg)
    if student.shape != teacher.shape:
        msg = (
            f"Logits of the student are {tuple(student.shape)} and of the teacher "
            f"{tuple(teacher.shape)}; they must have the same shape (n, n_classes, ...)."
        )
        raise SearchError(msg)
    log_q, log_p = student.log_softmax(1), teacher.detach().log_softmax(1)
    pairs = [_divergence(log_q, log_p, a, clip) for a in alphas]
    values = torch.stack([value for value, _ in pairs])
    slopes = torch.stack([slope for _, slope in pairs])
    which = values.argmax(0, keepdim=True)
    slope = slopes.gather(0, which).mean()
    return slope - slope.detach() + values.gather(0, which).mean()


def _divergence(
    log_q: torch.Tensor, log_p: torch.Tensor, alpha: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of each sample without a gradient, and a tensor with its gradient."""
    fixed = log_q.detach()
    q, log_ratio = fixed.exp(), log_p - fixed
    if math.isclose(alpha, 1.0, abs_tol=1e-3):
        pull = log_p.exp()
        value = pull * log_ratio
    elif math.isclose(alpha, 0.0, abs_tol=1e-3):
        log_ratio = log_ratio.clamp(max=math.log(clip))
        value, pull = -q * log_ratio, q * log_ratio
    else:
        power = (alpha * log_ratio).exp().clamp(max=clip)
        value, pull = q * (power - 1) / (alpha * (alpha - 1)), q * power / alpha
    return value.sum(1), -(pull * log_q).sum(1)


LOSSES: dict[str, DistillLoss] = {"soft": soft_cross_entropy, "alpha": alpha_divergence}


def loss_named(loss: str | DistillLoss | None) -> DistillLoss:
    """Return a loss by its name; a function is returned as it is.

    Raises:
        SearchError: The name is unknown, or the object cannot be called.
    """
    if loss is None:
        return soft_cross_entropy
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    if not callable(loss):
        msg = (
            f"distill_loss={loss!r:.60} is unknown.{did_you_mean(loss, LOSSES)} It is one of "
            f"{listed(LOSSES)}, or a function of the student's and the teacher's logits."
        )
        raise SearchError(msg)
    return loss


class Logits:
    """The logits of the module in training, taken from its forward passes.

    Args:
        module: The module in training.
        head: The module whose output is the logits; None: what the `forward` of `module` returns to
            its own training step, which may call it by that name.
        name: The name of the head, for messages.
        classes: Whether the loss needs classes in dimension 1.
        option: The option of `SubnetSampling` that names the head, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        head: nn.Module | None,
        name: str,
        *,
        classes: bool = True,
        option: str = "distill",
    ) -> None:
        self._module, self._head, self._name = module, head, name
        self._classes, self._option = classes, option
        self._outputs: list[Any] = []
        self._inputs: list[tuple[Any, Any]] = []
        self._teacher: torch.Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remember the output of each forward pass."""
        self._forget()
        try:
            with self._watching():
                yield
        finally:
            self._forget()

    def _forget(self) -> None:
        self._outputs, self._inputs, self._teacher = [], [], None

    def _remember(self, args: Any, kwargs: Any, out: Any) -> None:
        self._outputs.append(out)
        self._inputs.append((args, kwargs))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self._head is not None:

            def hook(_module: Any, args: Any, kwargs: Any, out: Any) -> None:
                self._remember(args, kwargs, out)

            with self._head.register_forward_hook(hook, with_kwargs=True):
                yield
            return
        forward = self._module.forward

        def remember(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._remember(args, kwargs, out)
            return out

        with shadowed(self._module, "forward", remember):
            yield

    def teacher(self, network: nn.Module | None = None) -> torch.Tensor:
        """Return the logits of the teacher, without their graph.

        Args:
            network: The teacher, which gets what the head got; None: the pass of the largest
                subnet, which has just been.

        Raises:
            SearchError: There was no pass or more than one, or its output is not a batch of logits.
        """
        if network is None:
            self._teacher = self._output().detach()
        elif self._teacher is None:
            if len(self._inputs) != 1:
                self._refuse(f"{len(self._inputs)} outputs")
            args, kwargs = self._inputs[0]
            with torch.no_grad():
                out = network(*args, **kwargs)
            logits = logits_in(out)
            if not isinstance(logits, torch.Tensor) or (self._classes and not _has_classes(logits)):
                msg = (
                    f"The teacher {class_name(network)} gave {_kind(out)}, which has no logits "
                    "(n, n_classes). Give distill= a module whose output is the logits, or has "
                    "them under 'logits'."
                )
                raise SearchError(msg)
            self._teacher = logits.detach()
        return self._teacher

    def student(self) -> torch.Tensor:
        """Return the logits of the pass of a subnet.

        Raises:
            SearchError: As for the teacher, or their shapes differ.
        """
        out, teacher = self._output(), self._teacher
        if teacher is not None and out.shape != teacher.shape:
            whose = "the teacher" if self._option == "logits" else "the largest subnet"
            shapes = f"{tuple(teacher.shape)} for {whose} and {tuple(out.shape)} for"
            self._refuse(f"{shapes} {'a subnet' if self._option == 'logits' else 'another'}")
        return out

    def _output(self) -> torch.Tensor:
        outputs, self._outputs, self._inputs = self._outputs, [], []
        out = outputs[0] if len(outputs) == 1 else None
        logits = logits_in(out)
        if not isinstance(logits, torch.Tensor) or (self._classes and not _has_classes(logits)):
            self._refuse(f"{len(outputs)} outputs" if len(outputs) != 1 else _kind(out))
        return logits

    def _refuse(self, output: str) -> NoReturn:
        msg = (
            f"Distillation needs one tensor of logits (n, n_classes) per step; {self._name} of "
            f"{type(self._module).__name__} gave {output}. "
            f"Name the submodule whose output is the logits: {self._option}='net'."
        )
        raise SearchError(msg)


def logits_in(output: Any) -> Any:
    """Return the logits in the output of a network, with the classes in dimension 1.

    A tensor is the logits as it is. Of a dict, as the models of transformers return it, they are
    what lies under `"logits"`; there the classes of sequences (n, length, n_classes) come last.

    Example:
        >>> logits_in({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 5, 3)}).shape
        torch.Size([2, 3, 5])
    """
    if not isinstance(output, Mapping):
        return output
    logits = output.get("logits")
    if isinstance(logits, torch.Tensor) and logits.ndim == _SEQUENCE:
        return logits.movedim(-1, 1)
    return logits


_SEQUENCE = 3  # dimensions of a batch of sequences


def taught(
    module: Any, teacher: nn.Module, logits: Logits, loss: DistillLoss, label_weight: float
) -> AbstractContextManager[None]:
    """Return a context in which a training step teaches the subnet in force.

    Its loss is that of distillation, and a share of the one that the step computes.

    Args:
        module: The module in training.
        teacher: The teacher.
        logits: The logits of the module.
        loss: The loss of distillation.
        label_weight: The share of the step's own loss.
    """
    step = module.training_step

    @wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        own = output.get("loss") if isinstance(output, Mapping) else output
        if own is None:  # the step leaves this batch out
            return output
        target = logits.teacher(teacher)
        new = loss(logits.student(), target)
        if label_weight > 0:
            new = new + label_weight * own
        return {**output, "loss": new} if isinstance(output, Mapping) else new

    return shadowed(module, "training_step", training_step)


def prepared_teacher(teacher: nn.Module, module: Any) -> nn.Module:
    """Return a teacher in eval mode, on the device and in the type of the module in training.

    Raises:
        SearchError: It shares weights with the module, which change.
    """
    own = {id(p) for p in module.parameters()}
    if any(id(p) in own for p in teacher.parameters()):
        msg = (
            f"distill= is a {class_name(teacher)} that shares weights with "
            f"{type(module).__name__}, and they are trained. Pass "
            "copy.deepcopy(network), made before training."
        )
        raise SearchError(msg)
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is not None:
        teacher.to(device=weight.device, dtype=weight.dtype)
    return teacher.eval()


def _has_classes(out: torch.Tensor) -> bool:
    return out.is_floating_point() and out.ndim > 1 and out.shape[1] > 1


def _kind(out: Any) -> str:
    if isinstance(out, torch.Tensor):
        return f"{tuple(out.shape)} {out.dtype}"
    if isinstance(out, Mapping):
        return f"a {type(out).__name__} with {listed(out)}, of which none is a tensor 'logits'"
    return f"a {type(out).__name__}"
