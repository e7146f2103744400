# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_subnet.errors import SearchError
from lightning_subnet.training import alpha_divergence
from lightning_subnet.training.distillation import loss_named, soft_cross_entropy

N, CLASSES = 6, 7


def logits(seed: int = 0, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(N, CLASSES, dtype=torch.float64, generator=rng) for _ in range(2)
    )
    return student, teacher


def softmax(x: torch.Tensor) -> np.ndarray:
    e = np.exp(x.detach().numpy() - x.detach().numpy().max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_soft_cross_entropy_is_the_explicit_one() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = -(b.softmax(1) * a.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(a, b), expected)


@pytest.mark.parametrize(
    ("alpha", "closed"),
    [
        (1.0, lambda p, q: (p * np.log(p / q)).sum(1)),
        (0.0, lambda p, q: (q * np.log(q / p)).sum(1)),
        (2.0, lambda p, q: (p**2 / q).sum(1) / 2 - 0.5),  # half of chi-squared
        (-1.0, lambda p, q: (q**2 / p).sum(1) / 2 - 0.5),  # of the reverse
        (0.5, lambda p, q: 4 - 4 * np.sqrt(p * q).sum(1)),  # four times squared Hellinger
    ],
)
def test_closed_forms(alpha: float, closed: Callable[..., np.ndarray]) -> None:
    student, teacher = logits()
    value = alpha_divergence(student, teacher, alpha=alpha, clip=math.inf)
    expected = closed(softmax(teacher), softmax(student)).mean()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    near = alpha_divergence(student, teacher, alpha=alpha + 2e-3, clip=math.inf)
    assert near.item() == pytest.approx(expected, rel=0.02)  # no jump where limits are taken
    assert alpha_divergence(teacher, teacher, alpha=alpha).item() == pytest.approx(0, abs=1e-12)


def test_at_one_it_is_torchs_kl() -> None:
    student, teacher = logits()
    ours = alpha_divergence(student.requires_grad_(), teacher, alpha=1)
    (grad,) = torch.autograd.grad(ours, student)
    theirs = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, student)[0])
    (soft,) = torch.autograd.grad(soft_cross_entropy(student, teacher), student)
    torch.testing.assert_close(grad, soft)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0, 2.0, (-1.0, 1.0)])
def test_the_gradient_is_that_of_the_value(alpha: float | tuple[float, float]) -> None:
    student, teacher = logits(scale=1.0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: alpha_divergence(s, teacher, alpha=alpha, clip=math.inf), student
    )


@pytest.mark.parametrize(("alpha", "clip"), [(-1.0, 5.0), (-1.0, 1.5), (2.0, 3.0)])
def test_clipped_powers_by_hand(alpha: float, clip: float) -> None:
    student, teacher = logits(scale=2.0)
    loss = alpha_divergence(student.requires_grad_(), teacher, alpha=alpha, clip=clip)
    (grad,) = torch.autograd.grad(loss, student)
    p, q = softmax(teacher), softmax(student)
    power = (p / q) ** alpha
    assert (power > clip).any()
    weights = q * np.minimum(power, clip) / alpha
    # d log q_i / d z_j is 1 (i = j) - q_j, so -sum_i w_i d log q_i / d z_j = q_j sum(w) - w_j.
    expected = (q * weights.sum(1, keepdims=True) - weights) / N
    np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-10, atol=1e-14)
    values = (q * (np.minimum(power, clip) - 1)).sum(1) / (alpha * (alpha - 1))
    assert loss.item() == pytest.approx(values.mean(), rel=1e-12)


def test_each_sample_takes_the_greater_one() -> None:
    student, teacher = logits(scale=2.0)
    one = [
        [alpha_divergence(student[i : i + 1], teacher[i : i + 1], alpha=a) for i in range(N)]
        for a in (-1.0, 1.0)
    ]
    values = torch.tensor(one)
    which = values.argmax(0)
    assert 0 < which.sum() < N  # both occur
    student.requires_grad_()
    both = alpha_divergence(student, teacher)
    assert both.item() == pytest.approx(values.max(0).values.mean().item(), rel=1e-12)
    (grad,) = torch.autograd.grad(both, student)
    for i, a in enumerate(which):
        row = student[i : i + 1].detach().requires_grad_()
        alone = alpha_divergence(row, teacher[i : i + 1], alpha=(-1.0, 1.0)[a])
        torch.testing.assert_close(torch.autograd.grad(alone, row)[0][0] / N, grad[i])


def test_far_apart_distributions_give_finite_gradients() -> None:
    student = torch.tensor([[80.0, 0.0, -80.0]], requires_grad=True)
    teacher = torch.tensor([[-80.0, 0.0, 80.0]])
    loss = alpha_divergence(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad[0, 0] > 0 > student.grad[0, 2]  # less of the first, more of the last


def test_positions_are_averaged_and_the_teacher_gets_nothing() -> None:
    student, teacher = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    teacher.requires_grad_()
    loss = alpha_divergence(student, teacher)
    flat = [x.transpose(1, 2).reshape(6, 5) for x in (student, teacher)]
    torch.testing.assert_close(loss, alpha_divergence(*flat))
    loss.backward()
    assert teacher.grad is None


def test_bad_arguments_are_refused() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    for options in ({"alpha": ()}, {"alpha": math.inf}, {"clip": 0.0}, {"clip": math.nan}):
        with pytest.raises(SearchError, match="give finite alphas"):
            alpha_divergence(a, b, **options)
    with pytest.raises(SearchError, match=r"\(2, 3\) and of the teacher \(2, 4\)"):
        alpha_divergence(a, torch.zeros(2, 4))
    assert loss_named("alpha") is alpha_divergence
    assert loss_named(None) is soft_cross_entropy
    assert loss_named(F.mse_loss) is F.mse_loss
    with pytest.raises(SearchError, match="Did you mean 'alpha'"):
        loss_named("alfa")
    with pytest.raises(SearchError, match="distill_loss=3"):
        loss_named(3)
