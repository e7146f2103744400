# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of a forward pass: what counts, what is named, and what stays as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lightning_subnet._torch.macs import count_macs
from lightning_subnet.errors import CostWarning, MeasurementError
from tests._torch.test_formulas import Applied
from tests.problems import assert_clear


@torch.library.custom_op("lightning_subnet_tests::project", mutates_args=())
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@torch.library.custom_op("lightning_subnet_tests::scale", mutates_args=())
def scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


@torch.library.custom_op("lightning_subnet_tests::lookup", mutates_args=())
def lookup(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return weight[index]


class After(nn.Module):
    """A counted layer of 8 x 8, then a function of it with another weight (8, 8)."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.odd = Applied(fn, 8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.odd(self.first(x))


X = torch.randn(4, 8)
OF_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda w: w,
    "slice": lambda w: w[:4],
    "columns": lambda w: w[:, ::2].repeat(1, 2),
    "transposed copy": lambda w: w.t().contiguous(),
    "other type and back": lambda w: w.double().float(),
    "parts": lambda w: torch.cat([w[:2], w[6:]]),
    "masked": lambda w: w * w.abs().sign(),
    "one row": lambda w: w[:1],
    "with a constant": lambda w: torch.eye(8) + w,
    "by index": lambda w: w[torch.arange(8).flip(0)],
}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_an_operator_of_another_package_that_takes_weights_is_named(name: str) -> None:
    net = After(lambda w, x: project(x, OF_WEIGHTS[name](w)))
    with pytest.raises(MeasurementError) as caught:
        count_macs(net, X)
    assert_clear(
        caught.value, "The MACs of After cannot be counted", "lightning_subnet_tests::project",
        "After.odd", "register_flop_formula", "network_measure",
    )  # fmt: skip


def test_a_mask_that_a_module_keeps_leaves_weights_what_they_are() -> None:
    net = After(lambda w, x: project(x, w * net.mask))
    net.mask, net.masks = torch.ones(8), [torch.ones(8)]
    with pytest.raises(MeasurementError, match="lightning_subnet_tests::project"):
        count_macs(net, X)


AS_DATA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "written into zeros": lambda x: torch.zeros(4, 8).copy_(x),
    "written into a slice": lambda x: torch.zeros(4, 8).index_put_((torch.tensor([1]),), x[:1]),
    "by out=": lambda x: torch.mul(x, 2.0, out=torch.empty(4, 8)),
    "by way of numpy": lambda x: torch.from_numpy(x.numpy() + 1),
    "joined": lambda x: torch.cat([torch.zeros(1, 8), x]),
    "noise": lambda x: torch.randn(4, 8),
    "noise in place": lambda x: torch.empty(4, 8).normal_(),
}


@pytest.mark.parametrize("name", AS_DATA)
def test_data_is_known_by_where_it_comes_from(name: str) -> None:
    net = After(lambda w, x: project(AS_DATA[name](x), w))
    with pytest.raises(MeasurementError, match="lightning_subnet_tests::project"):
        count_macs(net, X)


def test_each_module_in_which_it_ran_is_named() -> None:
    class Many(nn.ModuleList):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                x = layer(x)
            return x

    net = Many([After(lambda w, x: project(x, w)) for _ in range(5)])
    with pytest.raises(MeasurementError, match=r"project in Many\.0\.odd, .*Many\.2\.odd, \.\.\."):
        count_macs(net, X)


@pytest.fixture
def registered() -> Iterator[None]:
    operator = torch.ops.lightning_subnet_tests.project

    @register_flop_formula(operator)
    def flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]

    yield
    del flop_registry[operator]


@pytest.mark.usefixtures("registered")
def test_a_registered_formula_counts() -> None:
    assert count_macs(After(lambda w, x: project(x, w[:3])), X) == 4 * 64 + 4 * 8 * 3


def test_operators_of_another_package_that_scale_or_look_up_are_no_error() -> None:
    assert count_macs(After(lambda w, x: scale(x, w[0])), X) == 4 * 64
    assert count_macs(After(lambda w, x: x + lookup(w, torch.arange(4))), X) == 4 * 64
    assert count_macs(After(lambda w, x: project(x, x)), X) == 4 * 64  # no weights


def test_an_operator_of_torch_without_a_formula_is_named_if_weights_are_in_it() -> None:
    with pytest.raises(MeasurementError, match=r"aten::_linalg_solve_ex in After\.odd"):
        count_macs(After(lambda w, x: torch.linalg.solve(w + 9 * torch.eye(8), x[0])), X)


PLAIN: dict[str, Callable[..., Any]] = {
    "gate": lambda w, x: x * w[0],
    "gate of a matrix": lambda w, x: x[:, None] * w,
    "bias": lambda w, x: x + w[0],
    "interpolation": lambda w, x: torch.lerp(x, w[:4], 0.5),
    "normalisation": lambda w, x: F.layer_norm(x, (8,), w[0], w[1]),
    "group": lambda w, x: F.group_norm(x, 2, w[0], w[1]),
    "rms": lambda w, x: F.rms_norm(x, (8,), w[0]),
    "statistics": lambda w, x: F.batch_norm(x, w[0].detach(), w[1].abs().detach(), w[2], w[3]),
    "activation": lambda w, x: F.prelu(x, w[0]),
    "glu": lambda w, x: F.glu(torch.cat([x, w[:4]], 1)),
    "token": lambda w, x: torch.cat([w[:1], x]),
    "choice": lambda w, x: torch.where(x > 0, x, w[:4]),
    "embedding": lambda w, x: x + F.embedding(torch.arange(4), w),
    "bag": lambda w, x: x + F.embedding_bag(torch.zeros(4, 2).long(), w),
    "rows": lambda w, x: x + w[torch.arange(4)],
    "resized": lambda w, x: x + F.interpolate(w[None, None], (4, 8), mode="bilinear")[0, 0],
    "written": lambda w, x: x.clone().index_copy_(0, torch.tensor([1]), w[:1].detach()),
    "norm": lambda w, x: x * torch.linalg.vector_norm(w),
    "cross": lambda w, x: torch.linalg.cross(x[:, :3], w[:4, :3]),
    "loss": lambda w, x: F.mse_loss(x, w[:4]),
    "sampled": lambda w, x: F.grid_sample(x[None, None], w.view(1, 4, 8, 2).tanh()),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("error::lightning_subnet.errors.CostWarning")
def test_elementwise_products_norms_and_lookups_count_nothing(name: str) -> None:
    assert count_macs(After(PLAIN[name]), X) == 4 * 64


@pytest.mark.filterwarnings("error::lightning_subnet.errors.CostWarning")
def test_what_is_computed_of_weights_alone_is_no_error() -> None:
    for layer in (
        parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="matrix_exp"),
        parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
    ):
        assert count_macs(layer, X) >= 4 * 64


def test_a_transform_without_weights_is_left_out_with_one_warning() -> None:
    net = After(lambda w, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w[0])))
    with pytest.warns(CostWarning) as caught:
        assert count_macs(net, X) == 4 * 64
    assert_clear(caught[0].message, "The MACs of After leave out", "aten::_fft_r2c in After.odd")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(net, X) == 4 * 64
    with pytest.warns(CostWarning):
        count_macs(After(lambda w, x: torch.fft.rfft(x)), X)


def test_a_network_that_makes_tensors_counts_in_the_type_of_its_weights() -> None:
    def masked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(8) @ w

    for dtype in (torch.bfloat16, torch.half, torch.double):
        assert count_macs(After(masked).to(dtype), X) == 2 * 4 * 64
    assert torch.get_default_dtype() == torch.float32


def test_samples_of_many_kinds() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, n: int = 1) -> Any:
            x = self.embedding(ids)
            return {"logits": self.last(x if mask is None else x * mask[..., None])}

    ids = torch.zeros(2, 5, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16):
        net = Tokens().to(dtype)
        assert count_macs(net, ids) == 10 * 24
        assert count_macs(net, (ids, torch.ones(2, 5))) == 10 * 24
        assert count_macs(net, (ids, None, 2)) == 10 * 24
        assert count_macs(net, {"ids": ids, "mask": torch.ones(2, 5)}) == 10 * 24
    assert count_macs(Tokens().to("meta"), ids) == 10 * 24


def test_parts_that_are_checkpointed_scripted_or_cast() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    class Outer(nn.Module):
        def __init__(self, run: Callable[[Any], Any], part: Any) -> None:
            super().__init__()
            self.run, self.part = run, part

        def forward(self, x: torch.Tensor) -> Any:
            return self.run(x)

    def cast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(x)

    scripted = torch.jit.script(inner)
    traced = torch.jit.trace(inner, X)
    for _ in range(3):  # after which TorchScript has optimised them
        scripted(X), traced(X)
    frozen = torch.jit.freeze(torch.jit.script(inner.eval()))
    for run, part in [
        (lambda x: checkpoint(inner, x, use_reentrant=False), inner),
        (lambda x: checkpoint(inner, x, use_reentrant=True), inner),
        (cast, inner), (scripted, scripted), (traced, traced), (frozen, frozen),
    ]:  # fmt: skip
        assert count_macs(Outer(run, part), X) == 2 * 4 * 64


def test_a_compiled_part_counts() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="aot_eager")
    with torch.no_grad():
        compiled(X)
    assert count_macs(nn.Sequential(compiled, nn.Linear(8, 2)), X) == 4 * 64 + 4 * 16


def test_optimised_torchscript_hides_its_convolutions_and_is_named() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fast = torch.jit.optimize_for_inference(torch.jit.script(conv))
    if "prim::mkldnn_convolution" not in str(fast.inlined_graph):
        pytest.skip("this build of torch does not optimise it")
    net = nn.Sequential(fast, nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(MeasurementError, match="prim::mkldnn_convolution in 0"):
        count_macs(net, torch.zeros(1, 3, 4, 4))


def test_views_of_parameters_between_modules_are_no_trouble() -> None:
    # torch's own ModuleTracker raises "Expected gradient function to be set" for these.
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 8)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.token.expand(len(x), -1)) + self.layer(x)

    assert count_macs(Tokens(), X) == 2 * 4 * 64


def test_a_forward_pass_outside_of_torch_is_refused_where_nothing_else_counts() -> None:
    class OfNumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.asarray(x) @ self.weight.detach().numpy())

    with pytest.raises(MeasurementError, match=r"No multiplication .* outside of PyTorch"):
        count_macs(OfNumpy(), X)


def test_modules_and_hooks_are_as_before_also_after_an_error() -> None:
    from torch.nn.modules import module as of_torch

    before = len(of_torch._global_forward_pre_hooks), len(of_torch._global_forward_hooks)
    count_macs(nn.Linear(8, 8), X)
    with pytest.raises(MeasurementError):
        count_macs(nn.Linear(8, 8), torch.zeros(1, 3))
    assert (len(of_torch._global_forward_pre_hooks), len(of_torch._global_forward_hooks)) == before
