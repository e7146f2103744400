# SPDX-License-Identifier: Apache-2.0
"""Networks without `extract` are sliced: outputs, sizes, training, and what is done with them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import types
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, Subnet, SubnetMixin, elastic, extract
from lightning_subnet._torch.inputs import arguments
from lightning_subnet._torch.outputs import difference
from lightning_subnet.elasticity.batchnorm import recalibrate
from lightning_subnet.elasticity.extraction import frozen_copy
from lightning_subnet.elasticity.slicing.counting import used_weights
from lightning_subnet.elasticity.slicing.network import SlicedNetwork
from lightning_subnet.errors import ElasticityError
from lightning_subnet.export.exporting import export
from tests.elasticity.slicing.networks import FAMILIES, IMAGES, ROWS, TOKENS, made

# The weights of each family's smallest subnet, by hand.
SMALLEST = {
    "hat": 20 * 8 + 12 * 8 + (8 + 1) * 8 * 2 + 2 * 8,
    "hat with a mask": 20 * 8 + 12 * 8 + (8 + 1) * 8 * 2 + 2 * 8,
    "whittle": 20 * 16 + (8 + 1) * 12 + (4 + 1) * 8 + 20 * 8,
    "slimmable": (27 + 1) * 4 + 2 * 4 + (9 + 1) * 4 + (4 + 1) * 5,
    "universally slimmable": (27 + 1) * 4 + 2 * 4 + (9 + 1) * 4 + (4 + 1) * 5,
    "autoformer": (48 + 1) * 8 + (8 + 1) * 24 + (8 + 1) * 8 + 9 * 2 + 8 + (8 + 1) * 5,
    "dynabert": 20 * 16 + (16 + 1) * 64 + (16 + 1) * 8 + 8 * 16 + 16 + 2 * 16 + (16 + 1) * 3,
    "ofa": (3 + 1) * 4 + 9 * 4 + 81 + 2 * 4 + (4 + 1) * 5,
}


def run(net: nn.Module, example: Any) -> Any:
    args, kwargs = arguments(net, example)
    with torch.no_grad():
        return net(*args, **kwargs)


def numel(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def rows(example: Any, n: int) -> Any:
    if isinstance(example, dict):
        return {name: rows(x, n) for name, x in example.items()}
    if isinstance(example, tuple):
        return tuple(rows(x, n) for x in example)
    return torch.cat([example] * n)[:n]


def foreign(net: nn.Module, space: SearchSpace) -> Any:
    """Attach a space whose values become attributes."""

    def activate(net: Any, subnet: Subnet) -> None:
        for name, value in subnet.items():
            setattr(net, name, value)

    net = elastic(net, space=space, activate=activate).eval()
    net.activate(space.largest)
    return net


SLOW = ("hat", "slimmable", "dynabert")  # each has a neighbour that is not


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES],
)
def sliced(request: pytest.FixtureRequest) -> tuple[str, Any, Any, Any]:
    net, example = made(request.param)
    return request.param, net, example, extract(net, net.search_space().smallest, example)


# What comes out


def test_a_slice_has_the_outputs_for_any_batch(sliced: tuple[str, Any, Any, Any]) -> None:
    _, net, example, plain = sliced
    assert plain.sliced is True
    assert isinstance(plain, SlicedNetwork)
    assert not plain.training
    assert plain.dynamic_batch
    assert plain.untrainable_because is None
    net.activate(net.search_space().smallest)
    for n in (1, 2, 5):
        expected, output = run(net, rows(example, n)), run(plain, rows(example, n))
        assert type(output) is type(expected)
        assert difference(expected, output).relative < 1e-6
    assert str(inspect.signature(plain.forward)).replace("= ", "=") == str(
        inspect.signature(net.forward).replace(
            parameters=[
                p.replace(annotation=p.empty)
                for p in inspect.signature(net.forward).parameters.values()
            ],
            return_annotation=inspect.Signature.empty,
        )
    )


def test_a_slice_has_its_own_weights_by_their_names(sliced: tuple[str, Any, Any, Any]) -> None:
    family, net, _, plain = sliced
    assert numel(plain) == SMALLEST[family]
    theirs = net.state_dict()
    for name, tensor in plain.state_dict().items():
        assert name in theirs
        assert tensor.ndim == theirs[name].ndim
        assert tensor.data_ptr() != theirs[name].data_ptr()
        assert all(n <= m for n, m in zip(tensor.shape, theirs[name].shape, strict=True))
    assert {n for n, p in plain.named_parameters()} <= {n for n, _ in net.named_parameters()}
    assert all(p.requires_grad for p in plain.parameters())


def test_a_slice_trains_as_the_network_does(sliced: tuple[str, Any, Any, Any]) -> None:
    net, example = made(sliced[0])
    plain = copy.deepcopy(sliced[3])
    net.activate(net.search_space().smallest)
    statistics = {name: x.clone() for name, x in net.named_buffers()}
    net.train()
    plain.train()
    gradients = []
    for each in (net, plain):
        torch.manual_seed(3)  # dropout
        args, kwargs = arguments(each, rows(example, 3))
        output = each(*args, **kwargs)
        tensors = output.values() if isinstance(output, dict) else output
        loss = sum(x.square().sum() for x in tensors)
        each.zero_grad()
        loss.backward()
        gradients.append((loss.item(), {n: p.grad for n, p in each.named_parameters()}))
    (one, theirs), (other, ours) = gradients
    assert one == pytest.approx(other, rel=1e-5)
    for name, gradient in ours.items():
        norm = theirs[name].norm().item()  # the rest of the weight gets none
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), name
    for name, buffer in plain.named_buffers():
        if "running" in name:
            moved = dict(net.named_buffers())[name].flatten()[: buffer.numel()]
            assert torch.allclose(buffer, moved, rtol=1e-5), name
            assert not torch.equal(moved, statistics[name].flatten()[: buffer.numel()])


def test_a_slice_is_copied_saved_and_cast(sliced: tuple[str, Any, Any, Any]) -> None:
    family, _, example, plain = sliced
    expected = run(plain, example)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    others = [
        copy.deepcopy(plain),
        pickle.loads(pickle.dumps(plain)),
        torch.load(file, weights_only=False),
    ]
    for other in others:
        assert difference(expected, run(other, example)).relative == 0
        assert other.sliced
        assert list(other.state_dict()) == list(plain.state_dict())
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    assert difference(expected, run(plain, example)).relative == 0
    others[0].load_state_dict(plain.state_dict())
    assert difference(expected, run(others[0], example)).relative == 0
    if family not in ("autoformer", "whittle"):  # which name a type themselves
        others[0].double()
        assert difference(expected, run(others[0], example)).relative < 1e-5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_counted_is_what_is_sliced(family: str) -> None:
    net, example = made(family)
    space = net.search_space()
    before = net.active_subnet
    for subnet in [space.largest, *space.sample(3, 1)]:
        plain = extract(net, subnet, example, only="example")
        assert plain.sliced
        used = used_weights(net, subnet, example)
        assert numel(plain) == sum(x.numel for x in used.values() if x.parameter)
        state = plain.state_dict()
        assert {n: x.numel() for n, x in state.items()} == {n: x.numel for n, x in used.items()}
        net.activate(subnet)
        assert difference(run(net, example), run(plain, example)).relative < 1e-6
        net.activate(before)
    assert net.active_subnet == before


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("family", ["hat with a mask", "whittle", "slimmable", "autoformer"])
def test_slices_are_exported(family: str, suffix: str, tmp_path: Any) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    net, example = made(family)
    plain = extract(net, net.search_space().smallest, example, only="inference")
    exported = export(plain, tmp_path / f"net{suffix}", example)
    assert exported.dynamic_batch
    assert exported.metadata["sliced"] is True


@pytest.mark.parametrize("only", [None, "inference"])
@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("slimmable", "smallest"),
        ("universally slimmable", "smallest"),
        ("ofa", "smallest"),
        ("ofa", "largest"),  # `running_mean[:w]` takes all of it
    ],
)
def test_statistics_of_a_slice_are_renewed(family: str, end: str, only: Any) -> None:
    net, example = made(family)
    subnet = getattr(net.search_space(), end)
    plain = extract(net, subnet, example, only=only)
    batches = [torch.randn(6, 3, 8, 8), torch.randn(4, 3, 8, 8)]
    net.activate(subnet)
    assert recalibrate(plain, batches) == recalibrate(net, batches) == 10
    again = extract(net, subnet, example, only="example")
    for name, buffer in again.named_buffers():
        torch.testing.assert_close(plain.get_buffer(name), buffer)


# How weights are used


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.other = nn.Parameter(torch.randn(8, 8))
        self.n = 8


def test_one_weight_in_two_places_is_one_weight() -> None:
    class Same(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = self.weight[: self.n]
            return F.linear(F.linear(x, w), w.t()) + F.linear(x, self.weight[: self.n].sum(0)[None])

    net = foreign(Same(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, ROWS)
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {"weight": (3, 8)}


def test_different_slices_of_a_weight_are_of_the_block_around_them() -> None:
    class Different(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = self.n
            one, other = self.weight[: n + 1, :n], self.weight[1:n, 1:6:2]
            return F.linear(x[:, :n], one)[:, :1] + F.linear(x[:, :3], other)[:, :1]

    net = foreign(Different(), SearchSpace(n=[3, 7]))
    for n, shape in ((3, (4, 5)), (7, (8, 7))):
        subnet = net.search_space().subnet({"n": n})
        plain = extract(net, subnet, ROWS)
        assert plain.sliced
        assert plain.weight.shape == shape
        assert used_weights(net, subnet, ROWS)["weight"].numel == plain.weight.numel()
        net.activate(subnet)
        torch.testing.assert_close(run(plain, ROWS), run(net, ROWS))


def test_what_is_computed_of_weights_stays_computed_and_learns() -> None:
    class Standardised(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = self.weight[: self.n]
            w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
            return F.linear(x, w + self.other[: self.n] @ self.other)

    net = foreign(Standardised(), SearchSpace(n=[2, 8]))
    plain = extract(net, net.search_space().smallest, ROWS).train()
    assert plain.weight.shape == (2, 8)
    assert plain.other.shape == (8, 8)
    plain(ROWS).sum().backward()
    assert plain.other.grad is not None
    assert abs(plain.weight.grad.sum().item()) < 1e-4  # a standardised weight has none along this


def test_what_activate_computes_is_a_weight_of_its_own() -> None:
    class Kept(SubnetMixin, Linears):
        def search_space(self) -> SearchSpace:
            return SearchSpace(n=[3, 8])

        def activate(self, subnet: Subnet) -> None:
            self.product = (self.weight @ self.other)[: subnet["n"]]
            self.rows = self.weight.index_select(0, torch.arange(subnet["n"]).flip(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.product) + F.linear(x, self.rows)

    net: Any = Kept().eval()
    smallest = net.search_space().smallest
    plain = extract(net, smallest, ROWS)
    assert plain.sliced
    assert sorted(tuple(p.shape) for p in plain.parameters()) == [(3, 8), (3, 8)]
    assert torch.equal(plain.weight, net.weight[:3].flip(0))
    assert sum(x.numel for x in used_weights(net, smallest, ROWS).values()) == 48
    net.activate(smallest)
    assert torch.equal(run(plain, ROWS), run(net, ROWS))


def test_random_numbers_of_torch_are_drawn_each_time() -> None:
    class Noisy(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x + torch.randn(8), self.weight[: self.n]) + torch.rand_like(x[:, :1])

    net = foreign(Noisy(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, ROWS)
    assert plain.sliced
    assert not torch.equal(run(plain, ROWS), run(plain, ROWS))


def test_a_buffer_of_indices_is_sliced_and_a_table_of_many_uses_is_not_repeated() -> None:
    class Relative(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("at", torch.arange(64).view(8, 8) % 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = self.n
            bias = self.weight[self.at[:n, :n].reshape(-1)].view(n, n, 8)
            return torch.einsum("bi,ijh->bjh", x[:, :n], bias)

    net = foreign(Relative(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, ROWS)
    assert plain.at.shape == (3, 3)
    assert plain.at.dtype == torch.int64
    assert plain.weight.shape == (8, 8)


def test_the_part_of_a_lightning_module_and_one_that_is_the_network_itself() -> None:
    class Lit(L.LightningModule, Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight[: self.n])

    net = foreign(Lit(), SearchSpace(n=[3, 8]))
    net.example_input_array = ROWS
    plain = extract(net, net.search_space().smallest)
    assert plain.sliced
    assert plain.weight.shape == (3, 8)
    assert extract(nn.ModuleDict({"net": net}), net.search_space().smallest).sliced


# What it takes


def test_another_call_than_it_was_sliced_for_is_an_error() -> None:
    class Optional(Linears):
        def forward(
            self, x: torch.Tensor, *, scale: torch.Tensor | None = None, twice: bool = False
        ) -> torch.Tensor:
            y = F.linear(x, self.weight[: self.n])
            y = y if scale is None else y * scale
            return 2 * y if twice else y

    net = foreign(Optional(), SearchSpace(n=[3, 8]))
    smallest = net.search_space().smallest
    plain = extract(net, smallest, ROWS)
    assert torch.equal(plain(x=ROWS, scale=None, twice=False), plain(ROWS))
    with pytest.raises(ValueError, match="got twice=True, and was sliced with its default"):
        plain(ROWS, twice=True)
    with pytest.raises(ValueError, match=r"got scale=a tensor \(1,\), and was sliced"):
        plain(ROWS, scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"takes inputs of \(a, 8\), and got \(2, 5\)"):
        plain(ROWS[:, :5])
    with pytest.raises(ValueError, match="another number of dimensions"):
        plain(ROWS[0])
    both = extract(net, smallest, {"x": ROWS, "scale": torch.ones(1), "twice": True})
    assert torch.equal(both(ROWS, scale=torch.full((1,), 3.0), twice=True), 6 * plain(ROWS))
    with pytest.raises(ValueError, match="got twice=False, and was sliced with True"):
        both(ROWS, scale=torch.ones(1))
    fixed = extract(net, smallest, ROWS, only="example")
    with pytest.raises(ValueError, match=r"takes inputs of \(2, 8\), and got \(3, 8\)"):
        fixed(rows(ROWS, 3))
    with pytest.raises(RuntimeError, match="cannot be trained: it was extracted for eval mode"):
        fixed.train()(ROWS)


def test_sequences_of_other_lengths_up_to_the_positions() -> None:
    net, _ = made("whittle")
    smallest = net.search_space().smallest
    plain = extract(net, smallest, TOKENS[:1], only="inference")
    net.activate(smallest)
    for n in (1, 3, 12):  # 12 is all of them, which torch.export rules out at first
        tokens = TOKENS.repeat(1, 2)[:, :n]
        assert difference(run(net, tokens), run(plain, tokens)).relative < 1e-6
    with pytest.raises(ValueError, match="size 13 is not from 0 to 12"):
        plain(torch.zeros(2, 13, dtype=torch.int64))


def test_a_network_that_fixes_its_batch_keeps_that_of_the_example() -> None:
    class Fixed(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight[: self.n]).reshape(len(x), -1)

    net = foreign(Fixed(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, ROWS[:1])
    assert plain.sliced
    assert not plain.dynamic_batch
    assert plain(ROWS[:1]).shape == (1, 3)


# Structures of arguments and outputs


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[Any, ...] = ()
    loss: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Input:
    x: torch.Tensor
    scale: float = 1.0


class Keyed(dict[str, Any]): ...


def test_outputs_and_inputs_of_classes_that_torch_does_not_know() -> None:
    class Structured(Linears):
        def forward(self, given: Input) -> Output:
            y = F.linear(given.x, self.weight[: self.n]) * given.scale
            return Output(y, hidden=(Keyed(sum=y.sum(-1)),))

    net = foreign(Structured(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, (Input(ROWS, 2.0),))
    assert plain.sliced
    assert plain.untrainable_because is None
    assert numel(plain) == 3 * 8
    net.activate(net.search_space().smallest)
    for each in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        given = Input(torch.randn(5, 8), 2.0)
        expected, output = net(given), each(given)
        assert type(output) is Output
        assert type(output.hidden[0]) is Keyed
        assert output.loss is None
        assert difference(expected, output).relative < 1e-6
    with pytest.raises(ValueError, match=r"The sliced Structured got given=.*tensors in a Input"):
        plain(Input(ROWS, 3.0))


# What cannot be had


def test_where_it_cannot_be_sliced_a_frozen_copy_says_why() -> None:
    class Decides(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return F.linear(x, self.weight[: self.n])
            return x

    class Draws(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight[: self.n]) * random.random()

    class Shaped(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, _ = torch.onnx.operators.shape_as_tensor(x)  # type: ignore[no-untyped-call]
            return F.linear(x, self.weight[: self.n]) * rows

    class Raises(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                raise TypeError("nothing for me")
            return F.linear(x, self.weight[: self.n])

    class Holds(Linears):
        def forward(self, x: torch.Tensor) -> Any:
            return types.SimpleNamespace(y=F.linear(x, self.weight[: self.n]))

    class Named(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("lambda", nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(getattr(self, "lambda")(x), self.weight[: self.n])

    space = SearchSpace(n=[3, 8])
    for net, example, reason in (
        (Decides(), ROWS, r"cannot follow it: `if x.sum\(\) > 0:` \(.*test_slicing.py, line \d+\)"),
        (Decides(), ROWS, r"goes by the values of a tensor.* torch.where\("),
        (Shaped(), ROWS, r"`rows, _ = .*shape_as_tensor\(x\)` .*reads the memory.*from x.shape"),
        (
            Raises(),
            ROWS,
            r"`raise TypeError\(.* line \d+\) fails while it is followed: nothing for me",
        ),
        (Holds(), ROWS, r"its forward\(\) returns a 'SimpleNamespace'\. .* or dataclasses of them"),
        (Draws(), ROWS, "it draws from the random numbers of Python"),
        (Linears(), None, "no example input is known"),
        (Named(), ROWS, "torch.export cannot follow it"),
    ):
        frozen: Any = extract(foreign(net, space), space.smallest, example)
        assert frozen.sliced is False
        assert type(frozen) is type(net)
        assert frozen.weight.shape == (8, 8)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(frozen.unsliced_because)
    with pytest.raises(ElasticityError, match=r"takes 2 positional arguments but 3 were given"):
        extract(foreign(Decides(), space), space.smallest, (ROWS, ROWS))


def test_a_network_that_trains_on_other_weights_runs_in_eval_mode_alone() -> None:
    class Auxiliary(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.weight[: self.n])
            return F.linear(x, self.other[: self.n]) + y if self.training else y

    net = foreign(Auxiliary(), SearchSpace(n=[3, 8]))
    plain = extract(net, net.search_space().smallest, ROWS)
    assert plain.sliced
    assert plain.untrainable_because == "it reads other in training alone"
    assert numel(plain) == 24
    with pytest.raises(RuntimeError, match=r"it reads other in training alone\. Call eval"):
        plain.train()(ROWS)


def test_extraction_leaves_the_network_as_it_was() -> None:
    for family in ("hat", "universally slimmable"):
        net, example = made(family)
        net.train()
        net.norm.eval()
        flags = [child.training for child in net.modules()]
        state = {name: x.clone() for name, x in net.state_dict().items()}
        drawn, active = torch.get_rng_state(), net.active_subnet
        extract(net, net.search_space().smallest, example)
        assert net.active_subnet == active
        assert [child.training for child in net.modules()] == flags
        assert torch.equal(drawn, torch.get_rng_state())
        for name, x in net.state_dict().items():
            assert torch.equal(x, state[name])
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("where", ["inputs", "call", "weights"])
def test_an_inference_mode_leaves_no_trace(where: str) -> None:
    class Net(Linears):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight[: self.n])

    with torch.inference_mode(where == "weights"):
        net = foreign(Net(), SearchSpace(n=[3, 8]))
    with torch.inference_mode(where == "inputs"):
        example = torch.randn(3, 8)
    smallest = net.search_space().smallest
    with torch.inference_mode(where == "call"):
        plain = extract(net, smallest, example)
        frozen: Any = frozen_copy(net, smallest)
    assert plain.sliced
    assert plain.untrainable_because is None
    assert not any(p.is_inference() for p in (*plain.parameters(), *frozen.parameters()))
    plain.train()(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_images_in_other_sizes() -> None:
    net, _ = made("slimmable")
    smallest = net.search_space().smallest
    plain = extract(net, smallest, IMAGES, only="inference")
    net.activate(smallest)
    images = torch.randn(3, 3, 12, 6)
    assert difference(run(net, images), run(plain, images)).relative < 1e-6


def test_what_cannot_be_sliced_is_told_once_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Deciding(nn.Module):
        width = 8

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(-x if x.sum() > 0 else x)[:, : self.width]

    net = elastic(
        Deciding(),
        space=SearchSpace(width=[2, 8]),
        activate=lambda net, subnet: setattr(net, "width", subnet["width"]),
    )
    plain = extract(net, net.search_space().smallest, torch.randn(3, 4))
    assert not plain.sliced
    assert "torch.export cannot follow it" in plain.unsliced_because
    assert capfd.readouterr() == ("", "")


class Attribute(SubnetMixin, nn.Module):
    """Has a running mean that is no buffer, and training moves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.last, self.kind, self.width = nn.Linear(4, 6), kind, 6
        if kind == "parameter":
            self.mean: torch.Tensor = nn.Parameter(torch.ones(4), requires_grad=False)
        else:
            self.mean = torch.ones(4)

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[2, 6])

    def activate(self, subnet: Any) -> None:
        self.width = subnet["width"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.kind == "rebound":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        elif self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return nn.functional.linear(
            x - self.mean, self.last.weight[: self.width], self.last.bias[: self.width]
        )


@pytest.mark.parametrize("kind", ["parameter", "rebound", "in place"])
@pytest.mark.parametrize("width", [2, 6])
def test_following_a_network_in_training_moves_nothing_of_it(kind: str, width: int) -> None:
    net, x = Attribute(kind), torch.randn(5, 4)
    subnet = net.search_space().subnet({"width": width})
    plain = extract(net, subnet, x)
    assert plain.sliced
    net.activate(subnet)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net.eval()(x))
    assert net.mean.tolist() == [1] * 4
