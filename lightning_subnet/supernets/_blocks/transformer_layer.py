# SPDX-License-Identifier: Apache-2.0
"""The layer of Transformers, elastic or plain, and its cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet._messages import did_you_mean, listed
from lightning_subnet.elasticity.attention import (
    ElasticEmbedding,
    ElasticLayerNorm,
    ElasticMultiheadAttention,
    KeyValueCache,
    MultiheadAttention,
    length_of,
)
from lightning_subnet.elasticity.extraction import with_settings
from lightning_subnet.elasticity.layers import ElasticLinear
from lightning_subnet.elasticity.sorting import Channels, inputs, outputs
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.space.choices import Choice, Value
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet
from lightning_subnet.study.additive import Term, additive_measure
from lightning_subnet.study.measures import Measure

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
Costs = tuple[float, float]  # MACs and parameters
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The sizes of a layer in one subnet.

    Args:
        dim: Channels between layers.
        heads: Heads of self-attention.
        ffn: Channels inside the feed-forward part.
        qkv: Channels of queries.
        kv_heads: Heads of keys and values in self-attention; 0: as many as `heads`.
        memory: Channels of the memory that cross attention attends to; 0: there is none.
        cross_heads: Its heads.
        bias: Whether linear layers have biases.
    """

    dim: int
    heads: int
    ffn: int
    qkv: int
    kv_heads: int = 0
    memory: int = 0
    cross_heads: int = 1
    bias: bool = True

    @property
    def kv(self) -> int:
        """Channels of keys and of values in self-attention."""
        return (self.kv_heads or self.heads) * (self.qkv // self.heads)

    def macs(self, tokens: int, memory: int = 0) -> int:
        """Return multiply-accumulates for so many tokens that attend to so many of the memory."""
        attention = tokens * self.dim * 2 * (self.qkv + self.kv) + 2 * tokens * tokens * self.qkv
        feed = 2 * tokens * self.dim * self.ffn
        if not self.memory:
            return attention + feed
        cross = 2 * self.qkv * (tokens * self.dim + memory * self.memory + tokens * memory)
        return attention + cross + feed


@dataclass(frozen=True, slots=True)
class Style:
    """The style that all layers of a network have in common.

    Args:
        norm_first: Whether a part normalises its input (GPT, ViT) or the sum behind it (HAT).
        activation: `"relu"` or `"gelu"`.
        dropout: Of attention weights, of the feed-forward part and of what is added.
    """

    norm_first: bool = True
    activation: str = "gelu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            msg = f"activation={self.activation!r} is not one of {listed(ACTIVATIONS)}."
            raise SpaceError(msg + did_you_mean(self.activation, ACTIVATIONS))
        if not 0 <= self.dropout < 1:
            msg = f"dropout={self.dropout!r} must be a share in [0, 1)."
            raise SpaceError(msg)


@dataclass(frozen=True, slots=True)
class Kit:
    """Constructors of the leaves of a layer: elastic or plain ones."""

    linear: Callable[..., nn.Linear]
    norm: Callable[[int], nn.LayerNorm]
    embedding: Callable[..., nn.Embedding]
    attention: Callable[..., MultiheadAttention]


PLAIN = Kit(nn.Linear, nn.LayerNorm, nn.Embedding, MultiheadAttention)
ELASTIC = Kit(ElasticLinear, ElasticLayerNorm, ElasticEmbedding, ElasticMultiheadAttention)


class TransformerLayer(nn.Module):
    """Self-attention, cross attention if there is a memory, and a feed-forward part.

    Args:
        kit: Elastic or plain leaves.
        spec: The sizes; of elastic leaves, the largest.
        style: The style that all layers have in common.
    """

    def __init__(self, kit: Kit, spec: LayerSpec, style: Style) -> None:
        super().__init__()
        room = {"kv_dim": spec.kv} if kit is ELASTIC else {}
        self.attention = kit.attention(
            spec.dim,
            spec.heads,
            n_kv_heads=spec.kv_heads or None,
            qkv_dim=spec.qkv,
            bias=spec.bias,
            dropout=style.dropout,
            **room,
        )
        self.attention_norm = kit.norm(spec.dim)
        self.cross: MultiheadAttention | None = None
        if spec.memory:
            self.cross = kit.attention(
                spec.dim,
                spec.cross_heads,
                qkv_dim=spec.qkv,
                memory_dim=spec.memory,
                bias=spec.bias,
                dropout=style.dropout,
            )
            self.cross_norm = kit.norm(spec.dim)
        self.inner = kit.linear(spec.dim, spec.ffn, bias=spec.bias)
        self.activation = ACTIVATIONS[style.activation]()
        self.outer = kit.linear(spec.ffn, spec.dim, bias=spec.bias)
        self.feed_norm = kit.norm(spec.dim)
        self.dropout = nn.Dropout(style.dropout)
        self.norm_first = style.norm_first
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            if spec.bias:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: torch.Tensor,
        *,
        causal: bool = False,
        padding: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_padding: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Apply the layer; (n, t, dim) to the same."""
        past, of_memory = (None, None) if cache is None else (cache.past, cache.memory)
        x = self._residual(
            x,
            self.attention_norm,
            lambda y: self.attention(y, causal=causal, key_padding_mask=padding, cache=past),
        )
        cross = self.cross
        if cross is not None:
            x = self._residual(
                x,
                self.cross_norm,
                lambda y: cross(y, memory, key_padding_mask=memory_padding, cache=of_memory),
            )
        return self._residual(x, self.feed_norm, self._feed)

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.outer(self.dropout(self.activation(self.inner(x))))
        return y

    def _residual(
        self, x: torch.Tensor, norm: nn.Module, part: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        y: torch.Tensor = (
            x + self.dropout(part(norm(x))) if self.norm_first else norm(x + self.dropout(part(x)))
        )
        return y


class LayerCache:
    """Keys and values that one layer has computed: of past positions, and of the memory."""

    def __init__(self) -> None:
        self.past, self.memory = KeyValueCache(), KeyValueCache()

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.past.reorder(rows)
        self.memory.reorder(rows)


def resize(layer: Any, spec: LayerSpec) -> None:
    """Put sizes in force in an elastic layer."""
    layer.attention.resize(
        dim=spec.dim,
        heads=spec.heads,
        kv_heads=spec.kv_heads or None,
        qkv=spec.qkv,
        bias=spec.bias,
    )
    if layer.cross is not None:
        layer.cross.resize(dim=spec.dim, heads=spec.cross_heads, qkv=spec.qkv, bias=spec.bias)
    for linear, width in ((layer.inner, spec.ffn), (layer.outer, spec.dim)):
        linear.active_out = width
        linear.active_bias = spec.bias


def feed_channels(layer: Any, widths: Sequence[int]) -> Channels:
    """Return the channels inside the feed-forward part of a layer, for `sort_channels`.

    Args:
        layer: A `TransformerLayer` of elastic leaves.
        widths: Numbers of channels of subnets that are to stay as they are.
    """
    read = inputs(layer.outer)
    return Channels([*outputs(layer.inner), *read], read, widths)


def head_channels(layer: Any, head_dim: int, heads: Sequence[int]) -> Channels:
    """Return the channels of self-attention, of which each head keeps its own.

    Args:
        layer: A `TransformerLayer` of elastic leaves, with as many keys as queries.
        head_dim: Channels of a head.
        heads: Numbers of heads of subnets that are to stay as they are.
    """
    attention = layer.attention
    read = inputs(attention.out)
    axes = [*outputs(attention.q, attention.k, attention.v), *read]
    return Channels(axes, read, [n * head_dim for n in heads], unit=head_dim)


@cache
def layer_params(spec: LayerSpec) -> int:
    """Return the number of parameters of a layer."""
    with torch.device("meta"):  # shapes are all that is needed
        layer = TransformerLayer(PLAIN, spec, Style())
    return sum(p.numel() for p in layer.parameters())


def copy_slices(plain: _M, whole: nn.Module) -> _M:
    """Give a plain network the leading slices of a super-network's weights, as copies.

    Parts have the same names in both, so each slice has the shape of the plain weight.

    Args:
        plain: The network of the subnet, on the meta device or with weights that are not needed.
        whole: The super-network.

    Returns:
        The plain network.
    """
    weights = dict(whole.named_parameters()) | dict(whole.named_buffers())
    slices = {
        name: weights[name].detach()[tuple(map(slice, tensor.shape))].clone()
        for name, tensor in plain.state_dict().items()
    }
    plain.load_state_dict(slices, assign=True)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(weights[name].requires_grad)
    return with_settings(plain, whole)


def subnet_in(space: SearchSpace, subnet: Subnet) -> Subnet:
    """Return a subnet as one of this space.

    Raises:
        InvalidSubnetError: It has a value that the network was not built with, or lacks one.
    """
    return space.from_indices(space.indices([subnet]))[0]


def layer_choices(
    depth: str, depths: Sequence[int], layers: Mapping[str, Sequence[Value]]
) -> dict[str, Choice]:
    """Return the choices of each layer, which exist while the network is deep enough.

    Args:
        depth: The name of the choice of depth.
        depths: Its values.
        layers: The values of each layer's choices, by the name before the layer's number.
    """
    return {
        f"{name}.{i}": Choice(
            values, when={} if i < min(depths) else {depth: [d for d in depths if d > i]}
        )
        for name, values in layers.items()
        for i in range(max(depths))
    }


def table_measures(
    space: SearchSpace,
    parts: Iterable[tuple[Sequence[str], Callable[..., Costs]]],
    constant: Costs,
    module: nn.Module,
    *,
    rows: int = 1,
) -> list[Measure]:
    """Return `macs`, `params` and `size_mb` as sums over parts.

    Args:
        space: The space.
        parts: Pairs (names of choices, a function of their values that returns MACs and
            parameters). Parts that share a function and the values share the table.
        constant: MACs and parameters of the parts that every subnet has.
        module: The network; `size_mb` counts the bytes of its type.
        rows: Of the batch; what parts say is for one.
    """
    of_costs: dict[Any, np.ndarray[Any, np.dtype[np.float64]]] = {}
    tables = []
    for names, costs in parts:
        values = [space.choices[name].values for name in names]
        key = (costs, *(tuple(v) for v in values))
        if key not in of_costs:
            shape = (*map(len, values), 2)
            of_costs[key] = np.array([costs(*v) for v in product(*values)], float).reshape(shape)
        tables.append((tuple(names), of_costs[key]))
    n_bytes = next(module.parameters()).element_size() / 1e6
    kinds = (("macs", "MAC", 0, float(rows)), ("params", "", 1, 1.0), ("size_mb", "MB", 1, n_bytes))
    return [
        additive_measure(
            name,
            space,
            [Term(names, table[..., at] * scale) for names, table in tables],
            constant=constant[at] * scale,
            unit=unit,
        )
        for name, unit, at, scale in kinds
    ]


def sinusoid(length: int, dim: int) -> torch.Tensor:
    """Return the positional encoding of Vaswani et al., 2017, section 3.5, (length, dim)."""
    position = torch.arange(length)[:, None]
    angle = position * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]


def fairseq_sinusoid(rows: int, dim: int, pad: int) -> torch.Tensor:
    """Return the table of fairseq, (rows, dim): sines, then cosines, and zeros at `pad`."""
    half = dim // 2
    steps = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(half - 1, 1)))
    angle = torch.arange(rows)[:, None] * steps
    table = F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim % 2))
    table[pad] = 0
    return table


def fairseq_places(tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """Return the row of fairseq's table for each token, (n, t): padding does not count."""
    real = (tokens != pad).long()
    return real.cumsum(1) * real + pad


def check_positive(**sizes: int | Sequence[int]) -> None:
    """Refuse sizes that are not positive integers, or that stand twice.

    Raises:
        SpaceError: With the first such size.
    """
    for name, size in sizes.items():
        values = list(size) if isinstance(size, list | tuple) else [size]
        good = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
        if not values or not good or len(set(values)) < len(values):
            many = "positive integers, each once" if values != [size] else "a positive integer"
            msg = f"{name}={size!r} must be {many}."
            raise SpaceError(msg)


def check_divides(name: str, parts: Iterable[int], whole_name: str, wholes: Iterable[int]) -> None:
    """Refuse a number of heads that does not divide the channels.

    Raises:
        SpaceError: With the first pair that does not fit.
    """
    wholes = list(wholes)
    for part in parts:
        for whole in wholes:
            if whole % part:
                msg = (
                    f"{name}={part} does not divide {whole_name}={whole}. "
                    f"Take values of {name} that divide every {whole_name}."
                )
                raise SpaceError(msg)


def check_tokens(tokens: torch.Tensor, longest: int, before: int = 0) -> None:
    """Refuse tokens that are not a batch of sequences within the positions of a network.

    Args:
        tokens: What should be (n, length).
        longest: The positions that the network has.
        before: The number of tokens that it has seen already.

    Raises:
        ElasticityError: The type or the shape is another one, or a sequence is empty or too long.
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):  # noqa: PLR2004 - rows and positions
        msg = (
            "Tokens are integers (n, length) of torch.int64 or torch.int32, not "
            f"{tuple(tokens.shape)} {tokens.dtype}."
        )
        raise ElasticityError(msg)
    length = length_of(tokens, 1)
    if length == 0:
        msg = f"Tokens are {tuple(tokens.shape)}: a sequence (n, length) has one token at least."
        raise ElasticityError(msg)
    if before + length > longest:
        msg = (
            f"{before + length} tokens are more than the {longest} positions of this network. "
            "Cut the sequence, or build the network with more; tokens are (n, length)."
        )
        raise ElasticityError(msg)


def look_up(table: nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
    """Return the vectors of tokens, (n, t) to (n, t, dim).

    Raises:
        ElasticityError: A token is not one of the table's. (Only a CPU notices; on a GPU CUDA's own
            assertion fails.)
    """
    vectors: torch.Tensor
    if torch._C._is_tracing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns that torch checks padding_idx
            vectors = table(tokens)
            return vectors
    try:
        vectors = table(tokens)
    except IndexError as error:
        msg = (
            f"Tokens are from {int(tokens.min())} to {int(tokens.max())}, but the table has "
            f"{table.num_embeddings}: 0 to {table.num_embeddings - 1}. Encode the text with the "
            "vocabulary that the network was built for."
        )
        raise ElasticityError(msg) from error
    return vectors
