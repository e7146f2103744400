# SPDX-License-Identifier: Apache-2.0
"""Skipping blocks of several arguments: small networks in the style of transformers and torch."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet._torch.outputs import difference
from lightning_subnet.errors import ElasticityError, SearchError
from lightning_subnet.supernets import skippable_blocks
from lightning_subnet.supernets._blocks.skips import SkippedBlock, Skips
from tests.problems import assert_clear

X = torch.linspace(-2, 2, 2 * 6 * 8).mul(7).sin().reshape(2, 6, 8)
PAD = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


class Attend(nn.Module):
    """Attention of one head, as transformers has it: with a mask, and its weights if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 8**0.5
        for term in (mask, bias):
            scores = scores if term is None else scores + term
        weights = scores.softmax(-1)
        return self.out(weights @ v), weights


class PostNorm(nn.Module):
    """A layer of BERT: modules that add and normalise in it, given by position and by name."""

    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.attention, self.output = Residual(Attend()), AddNorm()
        self.up, self.shows = nn.Linear(8, 16), shows

    def forward(self, x: torch.Tensor, mask: Any = None, *, head_mask: Any = None) -> Any:
        x, weights = self.attention(x, mask)
        return self.output(self.up(x).relu(), x), weights if self.shows else head_mask


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(8, eps=1e-12)

    def forward(self, x: torch.Tensor, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, weights = self.inner(x, mask)
        return self.norm(x + y), weights


class AddNorm(nn.Module):
    """It adds to its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(16, 8), nn.LayerNorm(8, eps=1e-12)

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(hidden) + x)


class Bert(nn.Module):
    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(PostNorm(shows) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x, _ = layer(x, mask, head_mask=None)
        return {"logits": self.head(x)}


class PreNorm(nn.Module):
    """A layer of T5: the first makes the bias of the positions, and the others pass it on."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attend()
        self.table = nn.Parameter(torch.randn(6, 6)) if first else None
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        position_bias = 2 * self.table if self.table is not None else position_bias
        x = hidden_states
        x = x + self.attention(self.norm(x), None, position_bias)[0]
        return x + self.down(self.up(x).relu()), position_bias


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList(PreNorm(i == 0) for i in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None
        for i, layer in enumerate(self.block):
            call = {"hidden_states": x, "position_bias": bias}
            x, bias = layer(**call) if i % 2 else layer(x, bias)
        return x


class Stack(nn.Module):
    """The stacks of torch, with masks."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        options = {"dim_feedforward": 16, "batch_first": True, "norm_first": norm_first}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are for one order of norms only
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 3)  # type: ignore[arg-type] # of any type
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **options), 2)  # type: ignore[arg-type] # of any type

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> Any:
        memory = self.encoder(x, src_key_padding_mask=pad)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return memory, self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=pad)


def seeded(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return net.eval()


def assert_skips(net: nn.Module, skips: Skips, example: tuple[Any, ...], subset: list[str]) -> Any:
    """Check that active and both extracted networks give the same; return what they give."""
    with torch.no_grad():
        skips.put(net, subset)
        active = net(*example)
        for remove in (False, True):
            small = skips.extract(net, subset, remove=remove)
            assert difference(active, small(*example)).relative == 0, (subset, remove)
            traces = {"forward", "_forward_before_skip", "_use_nested_tensor_before_skip"}
            assert not any(traces & vars(m).keys() for m in small.modules())
            assert sum(p.numel() for p in small.parameters()) == sum(
                p.numel()
                for name, p in net.named_parameters()
                if not name.startswith(tuple(f"{s}." for s in subset))
            )
    return active


NETS: dict[str, tuple[Any, tuple[Any, ...], list[str], list[str]]] = {
    "post-norm": (Bert, (X, torch.zeros(6, 6)), [f"layers.{i}" for i in range(3)], []),
    "without a mask": (Bert, (X,), [f"layers.{i}" for i in range(3)], []),
    "position bias": (T5, (X,), [f"block.{i}" for i in (1, 2, 3)], ["block.0"]),
    "torch": (
        lambda: Stack(False), (X, PAD),
        [f"encoder.layers.{i}" for i in range(3)] + [f"decoder.layers.{i}" for i in range(2)], [],
    ),
    "torch, norm first": (
        lambda: Stack(True), (X, PAD),
        [f"encoder.layers.{i}" for i in range(3)] + [f"decoder.layers.{i}" for i in range(2)], [],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", NETS)
def test_layers_of_several_arguments(kind: str) -> None:
    make, example, names, refused = NETS[kind]
    net = seeded(make())
    with torch.no_grad():
        whole = net(*example)
    skips = Skips.find(net, example)
    assert skips.names == names
    assert [*skips.refused] == refused
    assert skips.residual == refused + names
    assert all(skips.macs[name] > 0 for name in skips.residual)
    skips = copy.deepcopy(pickle.loads(pickle.dumps(skips)))
    twin = copy.deepcopy(net)
    outputs = [
        assert_skips(twin, skips, example, subset)
        for subset in (names[:1], names[-1:], names[1:], names, names[::2])
    ]
    assert all(difference(whole, output).relative > 1e-3 for output in outputs)
    skips.put(twin, [])
    with torch.no_grad():
        assert difference(whole, twin(*example)).relative == 0
    assert {k: repr(v) for k, v in vars(twin).items()} == {k: repr(v) for k, v in vars(net).items()}


def test_what_is_skipped_is_what_a_loop_without_it_gives() -> None:
    net = seeded(Bert())
    skips, mask = Skips.find(net, (X,)), torch.randn(6, 6)
    skips.put(net, ["layers.1"])
    y, _ = net.layers[0](X, mask)  # type: ignore[index] # a list
    y, _ = net.layers[2](y, mask)  # type: ignore[index] # a list
    assert torch.equal(net(X, mask)["logits"], net.head(y))  # type: ignore[operator] # a layer
    small = skips.extract(net, ["layers.1"])
    assert isinstance(small.get_submodule("layers.1"), SkippedBlock)
    shorter = skips.extract(net, ["layers.1"], remove=True)
    assert [*shorter.state_dict()] == [
        k.replace("layers.2", "layers.1") for k in net.state_dict() if not k.startswith("layers.1.")
    ]


def test_tensors_that_a_block_makes_are_not_skipped() -> None:
    skips = Skips.find(seeded(T5()), X)
    own = "gives a tuple in which element 1 is its own, a tensor of (6, 6)"
    assert skips.refused == {"block.0": own}
    shown = Skips.find(seeded(Bert(shows=True)), X)
    assert shown.names == []
    assert {*shown.refused.values()} == {own.replace("(6, 6)", "(2, 6, 6)")}
    with pytest.raises(ElasticityError) as caught:
        skippable_blocks(seeded(Bert(shows=True)), X)
    assert_clear(caught.value, "'layers.0' adds, but gives a tuple in which element 1 is its own")


def test_a_network_without_residual_blocks_has_none() -> None:
    skips = Skips.find(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), X)
    assert (skips.names, skips.residual, skips.refused, skips.macs) == ([], [], {}, {})
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    skips.put(net, [])
    assert torch.equal(skips.extract(net, [], remove=True)(X), net(X))


def test_a_block_that_is_not_there_is_refused() -> None:
    net = seeded(Bert())
    skips = Skips.find(net, X)
    for call in (skips.put, skips.extract):
        with pytest.raises(SearchError) as caught:
            call(net, ["layer.1"])
        assert_clear(caught.value, "no block 'layer.1' that may be skipped", "Did you mean")


def test_a_call_without_the_stream_is_an_error() -> None:
    net = seeded(T5())
    Skips.find(net, X).put(net, ["block.1"])
    with pytest.raises(TypeError, match="without its argument 'hidden_states'"):
        net.block[1](position_bias=None)  # type: ignore[index] # a list


def test_gradients_flow_around_a_skipped_layer() -> None:
    net = seeded(Bert()).train()
    skips = Skips.find(net, X)
    skips.put(net, ["layers.1"])
    net(X)["logits"].square().sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == name.startswith("layers.1."), name


def test_hooks_of_a_skipped_layer_go_along() -> None:
    net = seeded(Bert())
    net.layers[1].register_forward_hook(lambda _m, _args, output: (output[0] + 1, None))  # type: ignore[index] # a list
    skips = Skips.find(net, X)
    for subset in (["layers.1"], ["layers.0", "layers.1"], skips.names):
        skips.put(net, subset)
        for remove in (False, True):  # what changes the stream cannot be taken out
            small = skips.extract(net, subset, remove=remove)
            assert torch.equal(small(X)["logits"], net(X)["logits"])
            assert isinstance(small.get_submodule("layers.1"), SkippedBlock)
