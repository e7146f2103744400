# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_subnet._torch.macs import count_macs
from lightning_subnet.elasticity.attention import (
    ElasticEmbedding,
    ElasticLayerNorm,
    ElasticMultiheadAttention,
    KeyValueCache,
    MultiheadAttention,
)
from lightning_subnet.elasticity.extraction import plain_state
from lightning_subnet.errors import ElasticityError, InvalidSubnetError, SpaceError

few = settings(max_examples=20, deadline=None)


def random_weights(module: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)


def load_torch(ours: MultiheadAttention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        if theirs.in_proj_weight is not None:
            weights = theirs.in_proj_weight.chunk(3)
        else:
            weights = theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight
        biases = theirs.in_proj_bias.chunk(3)
        for layer, weight, bias in zip((ours.q, ours.k, ours.v), weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize("make", [MultiheadAttention, ElasticMultiheadAttention])
@pytest.mark.parametrize("memory_dim", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "both"])
def test_at_full_size_it_is_the_attention_of_torch(
    make: type[MultiheadAttention], memory_dim: int | None, dtype: torch.dtype, masking: str
) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(
        24, 4, kdim=memory_dim, vdim=memory_dim, batch_first=True, dtype=dtype
    )
    ours = make(24, 4, memory_dim=memory_dim).to(dtype)
    load_torch(ours, theirs)
    x = torch.randn(3, 7, 24, dtype=dtype, requires_grad=True)
    memory = torch.randn(3, 7, memory_dim or 24, dtype=dtype, requires_grad=True)
    source = x if memory_dim is None else memory
    padding = torch.arange(7) >= torch.tensor([[7], [5], [2]])
    mask = padding if masking in ("padding", "both") else None
    causal = masking in ("causal", "both")
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(
        x, source, source, key_padding_mask=mask, attn_mask=future, need_weights=False
    )
    got = ours(x, None if memory_dim is None else memory, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    inputs = [x] if memory_dim is None else [x, memory]
    heads = [theirs.out_proj.weight, theirs.out_proj.bias, theirs.in_proj_bias]
    ins = (
        [theirs.in_proj_weight]
        if memory_dim is None
        else [theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight]
    )
    weight = torch.randn_like(expected) / expected.numel()
    wanted = torch.autograd.grad((expected * weight).sum(), [*inputs, *heads, *ins])
    qkv = [ours.q, ours.k, ours.v]
    mine = torch.autograd.grad(
        (got * weight).sum(),
        [
            *inputs,
            *(ours.out.weight, ours.out.bias),
            *(layer.bias for layer in qkv),
            *(layer.weight for layer in qkv),
        ],
    )
    n = len(inputs) + 2
    joined = [*mine[:n], torch.cat(mine[n : n + 3])]
    joined += [torch.cat(mine[n + 3 :])] if memory_dim is None else mine[n + 3 :]
    for one, other in zip(joined, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        assert other.abs().max() > 1e-4  # the comparison says something


@few
@given(
    sizes=st.sampled_from([(8, 2, 2, 8), (12, 4, 2, 16), (16, 4, 1, 16), (4, 1, 1, 6)]),
    memory=st.sampled_from([None, 5, 9]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_subnet_is_attention_of_leading_slices_and_nothing_else_has_a_gradient(
    sizes: tuple[int, int, int, int], memory: int | None, bias: bool, seed: int
) -> None:
    dim, heads, kv_heads, qkv = sizes
    layer = ElasticMultiheadAttention(16, 4, qkv_dim=16, memory_dim=9 if memory else None)
    random_weights(layer, seed)
    layer.resize(dim=dim, heads=heads, kv_heads=kv_heads, qkv=qkv, bias=bias)
    by_hand = MultiheadAttention(
        dim, heads, n_kv_heads=kv_heads, qkv_dim=qkv, memory_dim=memory, bias=bias
    )
    full = layer.state_dict()
    by_hand.load_state_dict(
        {k: full[k][tuple(map(slice, v.shape))] for k, v in by_hand.state_dict().items()}
    )
    x = torch.randn(2, 5, dim)
    y = None if memory is None else torch.randn(2, 3, memory)
    plain = layer.plain(dim, memory)
    assert type(plain) is MultiheadAttention
    assert not any("Elastic" in type(child).__name__ for child in plain.modules())
    assert torch.equal(layer(x, y), by_hand(x, y))
    assert torch.equal(plain(x, y), layer(x, y))
    layer(x, y).square().sum().backward()
    by_hand(x, y).square().sum().backward()
    wanted = dict(by_hand.named_parameters())
    for name, parameter in layer.named_parameters():
        if name not in wanted:
            assert parameter.grad is None
            continue
        inside = tuple(map(slice, wanted[name].shape))
        expected = torch.zeros_like(parameter)
        expected[inside] = wanted[name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)
        outside = torch.ones_like(parameter, dtype=torch.bool)
        outside[inside] = False
        assert not parameter.grad[outside].any()


def test_grouped_queries_are_heads_with_repeated_keys_and_values() -> None:
    grouped = MultiheadAttention(24, 6, n_kv_heads=2)
    random_weights(grouped)
    whole = MultiheadAttention(24, 6)
    state = grouped.state_dict()
    for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
        heads = state[name].unflatten(0, (2, 4))
        state[name] = heads.repeat_interleave(3, 0).flatten(0, 1)
    whole.load_state_dict(state)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(grouped(x, causal=True), whole(x, causal=True))


@pytest.mark.parametrize("steps", [[1] * 6, [3, 1, 2], [6]])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_with_a_cache_is_decoding_without(steps: list[int], kv_heads: int) -> None:
    layer = ElasticMultiheadAttention(16, 4, n_kv_heads=4)
    random_weights(layer)
    layer.resize(dim=12, heads=4, kv_heads=kv_heads)
    x = torch.randn(3, 6, 12)
    cache = KeyValueCache()
    assert len(cache) == 0
    parts = [layer(part, causal=True, cache=cache) for part in x.split(steps, 1)]
    assert len(cache) == 6
    assert cache.keys.shape == (3, kv_heads, 6, 3)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, causal=True), atol=1e-6, rtol=1e-5)
    rows = torch.tensor([2, 0])
    cache.reorder(rows)
    new = torch.randn(2, 1, 12)
    again = layer(new, causal=True, cache=cache)
    whole = layer(torch.cat([x[rows], new], 1), causal=True)
    torch.testing.assert_close(again, whole[:, -1:], atol=1e-6, rtol=1e-5)


def test_a_cached_memory_is_not_computed_again() -> None:
    layer = MultiheadAttention(16, 4, memory_dim=10)
    memory, padding = torch.randn(2, 5, 10), torch.arange(5) >= torch.tensor([[5], [3]])
    cache, x = KeyValueCache(), torch.randn(2, 3, 16)
    whole = layer(x, memory, key_padding_mask=padding)
    calls = []
    layer.k.register_forward_hook(lambda *_: calls.append(1))
    parts = [
        layer(x[:, i : i + 1], memory, key_padding_mask=padding, cache=cache) for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)
    assert len(calls) == 1
    assert len(cache) == 5


def test_padding_has_no_influence_and_causal_means_only_the_past() -> None:
    layer = MultiheadAttention(16, 4)
    x = torch.randn(1, 6, 16)
    other = torch.cat([x[:, :4], torch.randn(1, 2, 16)], 1)
    padding = torch.tensor([[False] * 4 + [True] * 2])
    same = layer(x, key_padding_mask=padding), layer(other, key_padding_mask=padding)
    torch.testing.assert_close(same[0][:, :4], same[1][:, :4])
    torch.testing.assert_close(same[0][:, :4], layer(x[:, :4]))
    past = layer(x, causal=True), layer(other, causal=True)
    torch.testing.assert_close(past[0][:, :4], past[1][:, :4])
    assert not torch.allclose(past[0][:, 4:], past[1][:, 4:])


def test_multiplications_do_not_depend_on_the_heads() -> None:
    x = torch.zeros(1, 7, 12)
    for heads in (1, 2, 4):
        layer = MultiheadAttention(12, heads, qkv_dim=8)
        assert count_macs(layer, x) == 7 * 4 * 12 * 8 + 2 * 7 * 7 * 8
    assert count_macs(MultiheadAttention(12, 4, n_kv_heads=1, qkv_dim=8), x) == (
        7 * 2 * 12 * 8 + 7 * 2 * 12 * 2 + 2 * 7 * 7 * 8
    )


@few
@given(c=st.integers(1, 9), seed=st.integers(0, 99))
def test_layer_normalisation_and_embedding_are_leading_slices(c: int, seed: int) -> None:
    norm, table = ElasticLayerNorm(9), ElasticEmbedding(11, 9, padding_idx=0)
    random_weights(nn.ModuleList([norm, table]), seed)
    table.active_out = c
    tokens = torch.tensor([[1, 3, 0], [10, 3, 3]])
    x = table(tokens)
    assert torch.equal(x, table.weight[tokens][..., :c])
    expected = F.layer_norm(x, (c,), norm.weight[:c], norm.bias[:c])
    assert torch.equal(norm(x), expected)
    assert torch.equal(norm.plain(c)(table.plain()(tokens)), expected)
    assert type(table.plain()) is nn.Embedding
    assert type(norm.plain(c)) is nn.LayerNorm
    (norm(x) * torch.randn(2, 3, c)).sum().backward()
    for grad, inside in ((norm.weight.grad, norm.weight.grad[:c]), (table.weight.grad, None)):
        rest = grad[c:] if inside is not None else grad[:, c:]
        assert not rest.any()
    assert not table.weight.grad[0].any()  # padding
    assert not table.weight.grad[2].any()  # not looked up


def test_dropout_acts_while_training_only() -> None:
    layer, x = MultiheadAttention(8, 2, dropout=0.5), torch.randn(1, 20, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("make", [MultiheadAttention, ElasticMultiheadAttention])
def test_heads_that_do_not_divide(make: type[MultiheadAttention]) -> None:
    with pytest.raises(SpaceError, match=r"6 heads do not divide 640 channels.*qkv_dim=512"):
        make(640, 6)
    with pytest.raises(SpaceError, match="0 heads do not divide"):
        make(8, 0)
    with pytest.raises(SpaceError, match="3 heads of keys and values do not divide 4 heads"):
        make(8, 4, n_kv_heads=3)
    assert make(640, 8, qkv_dim=512).q.out_features == 512  # as HAT does


def test_sizes_that_the_layer_does_not_have_change_nothing() -> None:
    layer = ElasticMultiheadAttention(16, 4, qkv_dim=8)
    before = copy.deepcopy(vars(layer))
    for sizes, message in [
        ({"dim": 17}, r"dim=17 is not in 1\.\.16"),
        ({"heads": 3}, "3 heads do not divide 8 channels"),
        ({"qkv": 12}, r"qkv=12 is not in 1\.\.8"),
        ({"heads": 4, "kv_heads": 3}, "3 heads of keys and values"),
    ]:
        with pytest.raises(InvalidSubnetError, match=message):
            layer.resize(**sizes)
    assert (layer.n_heads, layer.q.active_out) == (before["n_heads"], 8)
    narrow = ElasticMultiheadAttention(16, 4, n_kv_heads=1)
    with pytest.raises(
        InvalidSubnetError, match=r"channels of keys and values=16 is not in 1\.\.4"
    ):
        narrow.resize(heads=4)
    roomy = ElasticMultiheadAttention(16, 4, n_kv_heads=1, kv_dim=16)
    roomy.resize(heads=4)
    with pytest.raises(InvalidSubnetError, match=r"input channels=10 is not in 1\.\.9"):
        ElasticLayerNorm(9)(torch.zeros(1, 10))
    with pytest.raises(InvalidSubnetError, match=r"input features=17 is not in 1\.\.16"):
        roomy(torch.zeros(1, 2, 17))
    table = ElasticEmbedding(3, 4)
    table.active_out = 5
    with pytest.raises(InvalidSubnetError, match=r"active_out=5 is not in 1\.\.4"):
        table(torch.tensor([0]))


def test_a_mask_of_another_kind_is_refused() -> None:
    layer, x = MultiheadAttention(8, 2), torch.zeros(2, 3, 8)
    for mask, told in [
        (torch.zeros(2, 4, dtype=torch.bool), r"\(2, 4\) torch.bool"),
        (torch.zeros(2, 3), r"\(2, 3\) torch.float32"),
    ]:
        with pytest.raises(ElasticityError, match=told + r"; it must be \(2, 3\) torch.bool"):
            layer(x, key_padding_mask=mask)


class Net(nn.Module):
    """Someone's network of these layers."""

    def __init__(self, elastic: bool) -> None:
        super().__init__()
        self.table = ElasticEmbedding(10, 8) if elastic else nn.Embedding(10, 4)
        self.norm = ElasticLayerNorm(8) if elastic else nn.LayerNorm(4)
        make = ElasticMultiheadAttention if elastic else MultiheadAttention
        self.attention = make(8, 2) if elastic else make(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(self.norm(self.table(tokens)), self.table(tokens[:, :2]))


def test_the_layers_in_a_network_of_ones_own_can_be_taken_out() -> None:
    net, plain = Net(elastic=True), Net(elastic=False)
    random_weights(net)
    net.table.active_out = 4
    net.attention.resize(dim=4, heads=2)
    tokens = torch.randint(10, (2, 5))
    plain.load_state_dict(plain_state(net, tokens))
    assert torch.equal(plain(tokens), net(tokens))
