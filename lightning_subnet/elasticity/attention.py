# SPDX-License-Identifier: Apache-2.0
"""Elastic layers of Transformers: embeddings, layer normalisation, multi-head attention.

As in `layers`, the first rows and columns of each weight are in force, used as views.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet.elasticity.layers import ElasticLayer, ElasticLinear, at_most, fill
from lightning_subnet.errors import ElasticityError, InvalidSubnetError, SpaceError


class ElasticEmbedding(ElasticLayer, nn.Embedding):
    """An embedding of which the first `active_out` dimensions run.

    Args:
        num_embeddings: The size of the vocabulary.
        embedding_dim: The most dimensions.
        padding_idx: The token whose vector stays zero and is not trained.

    Example:
        >>> layer = ElasticEmbedding(100, 8)
        >>> layer.active_out = 4
        >>> layer(torch.tensor([[1, 2, 3]])).shape, layer.plain()
        (torch.Size([1, 3, 4]), Embedding(100, 4))
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx)
        self.active_out = embedding_dim

    @property
    def active_weight(self) -> torch.Tensor:
        """A view of the vectors in force, (num_embeddings, active_out)."""
        return self.weight[:, : at_most("active_out", self.active_out, self.embedding_dim)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up; tokens (...) to (..., active_out)."""
        return F.embedding(input, self.active_weight, self.padding_idx)

    def plain(self, n_in: int = 1) -> nn.Embedding:
        """Return an `nn.Embedding` with a copy of the part in force; tokens have no channels."""
        layer = nn.Embedding(
            self.num_embeddings, self.active_out, padding_idx=self.padding_idx, device="meta"
        )
        return fill(layer, weight=self.active_weight)


class ElasticLayerNorm(ElasticLayer, nn.LayerNorm):
    """Layer normalisation of the first channels, as many as the input has.

    Mean and variance are those of the channels in force, so a narrower subnet is normalised as if
    it were alone.

    Args:
        dim: The most channels.
        eps: Added to the variance.

    Example:
        >>> layer = ElasticLayerNorm(8)
        >>> layer(torch.randn(2, 3, 4)).shape, layer.plain(4)
        (torch.Size([2, 3, 4]), LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True))
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; (..., c) to the same."""
        c = at_most("input channels", input.shape[-1], self.normalized_shape[0])
        return F.layer_norm(input, (c,), self.weight[:c], self.bias[:c], self.eps)

    def plain(self, n_in: int) -> nn.LayerNorm:
        """Return an `nn.LayerNorm` with a copy of the part in force."""
        at_most("input channels", n_in, self.normalized_shape[0])
        layer = nn.LayerNorm(n_in, eps=self.eps, device="meta")
        return fill(layer, weight=self.weight[:n_in], bias=self.bias[:n_in])


class KeyValueCache:
    """The keys and values of the positions so far, so that decoding computes each of them once.

    One attention layer has one cache.

    Attributes:
        keys: (n, key and value heads, positions, head dimension), or None while it is empty.
        values: The same shape.

    Example:
        >>> attention, cache = MultiheadAttention(8, 2), KeyValueCache()
        >>> for token in torch.randn(5, 1, 1, 8):
        ...     y = attention(token, causal=True, cache=cache)
        >>> y.shape, len(cache)
        (torch.Size([1, 1, 8]), 5)
    """

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def __len__(self) -> int:
        """Return the number of positions."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions, each argument (n, heads, positions, head dimension); return all."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order, as a beam search goes on with them."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class MultiheadAttention(nn.Module):
    """Multi-head attention of ordinary layers, on `scaled_dot_product_attention`.

    At `qkv_dim=embed_dim` it computes what `torch.nn.MultiheadAttention(batch_first=True)` does.

    Args:
        embed_dim: Channels of queries and of outputs.
        n_heads: Heads of the queries.
        n_kv_heads: Heads of keys and values, each shared by a group of query heads; None: as many.
        qkv_dim: Channels that the heads divide among them; None: `embed_dim`. HAT keeps 512 while
            embeddings and heads vary.
        memory_dim: Channels of keys' and values' inputs, for cross attention; None: `embed_dim`.
        bias: Whether the four projections have biases.
        dropout: Of the attention weights, while training.

    Raises:
        SpaceError: Heads that do not divide the channels, or groups that do not divide the heads.

    Example:
        >>> attention = MultiheadAttention(8, 4, n_kv_heads=2)
        >>> attention(torch.randn(2, 5, 8), causal=True).shape
        torch.Size([2, 5, 8])

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2; Ainslie et al., GQA,
        EMNLP 2023 (grouped queries); Wang et al., HAT, ACL 2020, section 2 (a fixed qkv dimension).
    """

    _linear: Callable[..., nn.Linear] = nn.Linear

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        qkv_dim: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        qkv_dim = embed_dim if qkv_dim is None else qkv_dim
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _check_heads(qkv_dim, n_heads, n_kv_heads, SpaceError)
        kv_dim = n_kv_heads * (qkv_dim // n_heads)
        memory_dim = embed_dim if memory_dim is None else memory_dim
        self._build(embed_dim, qkv_dim, kv_dim, memory_dim, bias)
        self.n_heads, self.n_kv_heads, self.dropout = n_heads, n_kv_heads, dropout

    def _build(
        self, embed_dim: int, qkv_dim: int, kv_dim: int, memory_dim: int, bias: bool
    ) -> None:
        linear = type(self)._linear
        self.q = linear(embed_dim, qkv_dim, bias=bias)
        self.k = linear(memory_dim, kv_dim, bias=bias)
        self.v = linear(memory_dim, kv_dim, bias=bias)
        self.out = linear(qkv_dim, embed_dim, bias=bias)
        for layer in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: torch.Tensor,
        memory: torch.Tensor | None = None,
        *,
        causal: bool = False,
        key_padding_mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (n, t, embedding).
            memory: (n, s, memory channels) that keys and values are made of; None: the query.
            causal: Whether a position sees only those up to itself. With a cache the queries are
                the last positions.
            key_padding_mask: (n, all key positions), true where there is only padding; a query
                needs one other position at least.
            cache: Of self-attention: is extended by the new positions. Of cross attention: keys and
                values of `memory` are computed when it is empty, and taken from it afterwards.

        Returns:
            (n, t, embedding).

        Raises:
            ElasticityError: A mask that is not boolean or has another shape.
        """
        q = self._split(self.q(query), self.n_heads)
        if memory is not None and cache is not None and cache.keys is not None:
            assert cache.values is not None
            k, v = cache.keys, cache.values
        else:
            source = query if memory is None else memory
            k = self._split(self.k(source), self.n_kv_heads)
            v = self._split(self.v(source), self.n_kv_heads)
            if cache is not None:
                k, v = cache.extend(k, v)
        n_new, n_keys = length_of(q, 2), length_of(k, 2)
        square = causal and n_new > 1 and n_new == n_keys and key_padding_mask is None
        mask = None
        if causal and n_new > 1 and not square:
            ones = torch.ones(n_new, n_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril(n_keys - n_new)
        if key_padding_mask is not None:
            _check_mask(key_padding_mask, query.shape[0], n_keys)
            real = ~key_padding_mask[:, None, None, :]
            mask = real if mask is None else mask & real
        if self.n_kv_heads < self.n_heads:  # enable_gqa= came with torch 2.5
            k = k.repeat_interleave(self.n_heads // self.n_kv_heads, 1)
            v = v.repeat_interleave(self.n_heads // self.n_kv_heads, 1)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=square)
        output: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return output

    @staticmethod
    def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
        """Return (n, heads, positions, head dimension) of (n, positions, channels)."""
        return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


class ElasticMultiheadAttention(MultiheadAttention):
    """Multi-head attention with elastic embedding, heads, groups and qkv dimension.

    Queries, keys and values are as wide as their inputs ask for; `resize` says how many output
    channels, heads and channels per head run. All four projections use their first rows and
    columns. Where `qkv_dim` stays as it is and only heads change, all weights stay in force and are
    divided anew, as in HAT.

    Args:
        embed_dim: The most channels of queries and outputs.
        n_heads: Heads of the queries that run at first.
        n_kv_heads: Heads of keys and values that run at first; None: as many.
        qkv_dim: The most channels of the queries; None: `embed_dim`.
        memory_dim: The most channels of keys' and values' inputs; None: `embed_dim`.
        bias: Whether the projections have biases; which `resize(bias=False)` can switch off.
        dropout: Of the attention weights, while training.
        kv_dim: The most channels of keys and values; None: what the first setting needs.

    Raises:
        SpaceError: Heads that do not divide the channels, or groups that do not divide the heads.

    Example:
        >>> attention = ElasticMultiheadAttention(16, 4)
        >>> attention.resize(dim=8, heads=2)
        >>> attention(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> attention.resize(dim=8, heads=3)
        Traceback (most recent call last):
        ...
        lightning_subnet.errors.InvalidSubnetError: 3 heads do not divide 8 channels...
    """

    _linear = ElasticLinear
    q: ElasticLinear
    k: ElasticLinear
    v: ElasticLinear
    out: ElasticLinear

    def __init__(  # noqa: PLR0913 - the arguments of the plain layer, and the room for elasticity
        self,
        embed_dim: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        qkv_dim: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        kv_dim: int | None = None,
    ) -> None:
        self._most_kv_dim = kv_dim
        super().__init__(
            embed_dim,
            n_heads,
            n_kv_heads=n_kv_heads,
            qkv_dim=qkv_dim,
            memory_dim=memory_dim,
            bias=bias,
            dropout=dropout,
        )
        self.resize(heads=n_heads, kv_heads=self.n_kv_heads, qkv=qkv_dim)

    def _build(
        self, embed_dim: int, qkv_dim: int, kv_dim: int, memory_dim: int, bias: bool
    ) -> None:
        super()._build(embed_dim, qkv_dim, self._most_kv_dim or kv_dim, memory_dim, bias)

    def resize(
        self,
        *,
        dim: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        qkv: int | None = None,
        bias: bool = True,
    ) -> None:
        """Put sizes in force; those that are not named are at their most.

        Args:
            dim: Output channels.
            heads: Heads of the queries; None: as many as now.
            kv_heads: Heads of keys and values; None: as many as `heads`.
            qkv: Channels of the queries; None: `dim`, but not more than the layer has.
            bias: Whether the biases run, if there are any.

        Raises:
            InvalidSubnetError: More than the layer was built with, or heads that do not divide;
                nothing is changed then.
        """
        dim = at_most("dim", self.out.out_features if dim is None else dim, self.out.out_features)
        heads = self.n_heads if heads is None else heads
        kv_heads = heads if kv_heads is None else kv_heads
        qkv = min(dim, self.q.out_features) if qkv is None else qkv
        qkv = at_most("qkv", qkv, self.q.out_features)
        _check_heads(qkv, heads, kv_heads, InvalidSubnetError)
        kv = kv_heads * (qkv // heads)
        kv = at_most("channels of keys and values", kv, self.k.out_features)
        for layer, width in ((self.q, qkv), (self.k, kv), (self.v, kv), (self.out, dim)):
            layer.active_out = width
            layer.active_bias = bias
        self.n_heads, self.n_kv_heads = heads, kv_heads

    def plain(self, n_in: int, memory_in: int | None = None) -> MultiheadAttention:
        """Return ordinary attention with a copy of the part in force.

        Args:
            n_in: The number of channels of the queries that it will get.
            memory_in: That of the memory; None: as many.
        """
        with torch.device("meta"):
            layer = MultiheadAttention(
                self.out.active_out,
                self.n_heads,
                n_kv_heads=self.n_kv_heads,
                qkv_dim=self.q.active_out,
                dropout=self.dropout,
            )
        memory_in = n_in if memory_in is None else memory_in
        layer.q, layer.out = self.q.plain(n_in), self.out.plain(self.q.active_out)
        layer.k, layer.v = self.k.plain(memory_in), self.v.plain(memory_in)
        return layer.train(self.training)


def _check_heads(
    channels: int, heads: int, kv_heads: int, error: type[SpaceError | InvalidSubnetError]
) -> None:
    """Refuse heads that do not divide the channels evenly."""
    if heads < 1 or channels < 1 or channels % heads:
        msg = (
            f"{heads} heads do not divide {channels} channels. Take a divisor, or keep a qkv "
            "dimension of its own that all numbers of heads divide, as HAT does (qkv_dim=512)."
        )
        raise error(msg)
    if kv_heads < 1 or heads % kv_heads:
        msg = (
            f"{kv_heads} heads of keys and values do not divide {heads} heads of queries. "
            f"Each is shared by a group of equal size: take a divisor of {heads}."
        )
        raise error(msg)


def length_of(x: torch.Tensor, dim: int) -> int:
    """Return a size that is not the batch's, as a number: an exported network keeps it."""
    if not torch._C._is_tracing():
        return x.shape[dim]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that it keeps it
        return int(x.shape[dim])


def _check_mask(mask: torch.Tensor, n: int, n_keys: int) -> None:
    """Refuse a mask of another type or shape."""
    if torch._C._is_tracing():
        return
    if mask.dtype != torch.bool or mask.shape != (n, n_keys):
        msg = (
            f"key_padding_mask is {tuple(mask.shape)} {mask.dtype}; it must be {(n, n_keys)} "
            "torch.bool, true where there is only padding."
        )
        raise ElasticityError(msg)
