# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of HAT: against a small SuperTransformer with its names, layout and semantics."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import Subnet, check_elastic, extract
from lightning_subnet.errors import SpaceError
from lightning_subnet.supernets import ElasticTransformer
from tests.problems import assert_clear
from tests.supernets.attention_contract import shaken

PAD, EOS = 1, 2
FAIRSEQ = {"positions": "fairseq", "pad": PAD, "bos": EOS, "eos": EOS}
SIZES = {**FAIRSEQ, "enc_depths": (3,), "attend": (1, 2, 3), "norm_first": False}


class Attention(nn.Module):
    """Projections as HAT stores them: one matrix, or three where the sides' widths differ."""

    def __init__(self, dim: int, memory: int, qkv: int) -> None:
        super().__init__()
        self.qkv = qkv
        if memory == dim:
            self.in_proj_weight = nn.Parameter(0.2 * torch.randn(3 * qkv, dim))
        else:
            self.q_proj_weight = nn.Parameter(0.2 * torch.randn(qkv, dim))
            self.k_proj_weight = nn.Parameter(0.2 * torch.randn(qkv, memory))
            self.v_proj_weight = nn.Parameter(0.2 * torch.randn(qkv, memory))
        self.in_proj_bias = nn.Parameter(0.2 * torch.randn(3 * qkv))
        self.out_proj = nn.Linear(qkv, dim)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, heads: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Attend; hidden is added to the scores (n, heads, t, s)."""
        weights = (
            self.in_proj_weight.chunk(3)
            if hasattr(self, "in_proj_weight")
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        q, k, v = (
            F.linear(y, weight[:, : y.shape[-1]], bias).unflatten(-1, (heads, -1))
            for y, weight, bias in zip(
                (x, memory, memory), weights, self.in_proj_bias.chunk(3), strict=True
            )
        )
        scores = torch.einsum("nthd,nshd->nhts", q, k) * (self.qkv // heads) ** -0.5
        mixed = torch.einsum("nhts,nshd->nthd", (scores + hidden).softmax(-1), v).flatten(2)
        dim = x.shape[-1]
        return F.linear(mixed, self.out_proj.weight[:dim], self.out_proj.bias[:dim])


def normalised(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    dim = x.shape[-1]
    return F.layer_norm(x, (dim,), norm.weight[:dim], norm.bias[:dim])


class Layer(nn.Module):
    """A layer of either side, of which the first channels run."""

    def __init__(self, config: Any, dim: int, memory: int) -> None:
        super().__init__()
        ffn, self.norm_first = max(config.ffn), config.norm_first
        self.self_attn = Attention(dim, dim, config.qkv)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        if memory:
            self.encoder_attn = Attention(dim, memory, config.qkv)
            self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self, x: torch.Tensor, ffn: int, attend: tuple[Any, ...], cross: tuple[Any, ...] = ()
    ) -> torch.Tensor:
        """Apply the layer; attend and cross have the other arguments of both attentions."""
        x = self.residual(self.self_attn_layer_norm, x, lambda y: self.self_attn(y, y, *attend))
        if cross:
            norm = self.encoder_attn_layer_norm
            x = self.residual(norm, x, lambda y: self.encoder_attn(y, *cross))
        return self.residual(self.final_layer_norm, x, lambda y: self.feed(y, ffn))

    def feed(self, x: torch.Tensor, ffn: int) -> torch.Tensor:
        dim = x.shape[-1]
        inner = F.linear(x, self.fc1.weight[:ffn, :dim], self.fc1.bias[:ffn]).relu()
        return F.linear(inner, self.fc2.weight[:dim, :ffn], self.fc2.bias[:dim])

    def residual(
        self, norm: nn.LayerNorm, x: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        if self.norm_first:
            return x + part(normalised(norm, x))
        return normalised(norm, x + part(x))


def places(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Sines, then cosines, by formula: the first token that is not padding is at PAD + 1."""
    half, table = width // 2, torch.zeros(*tokens.shape, width)
    for row, sequence in enumerate(tokens.tolist()):
        at = PAD
        for column, token in enumerate(sequence):
            if token == PAD:
                continue
            at += 1
            for i in range(half):
                angle = at * 10_000 ** (-i / (half - 1))
                table[row, column, i] = math.sin(angle)
                table[row, column, half + i] = math.cos(angle)
    return table


class Side(nn.Module):
    """Encoder or decoder, with the names of fairseq."""

    def __init__(self, config: Any, side: str, table: nn.Embedding) -> None:
        super().__init__()
        enc, dec = max(config.enc_embed), max(config.dec_embed)
        self.width, memory = (enc, 0) if side == "encoder" else (dec, enc)
        depth = max(config.enc_depths if side == "encoder" else config.dec_depths)
        self.embed_tokens = table
        self.layers = nn.ModuleList(Layer(config, self.width, memory) for _ in range(depth))
        self.layer_norm = nn.LayerNorm(self.width) if config.norm_first else None
        if side == "decoder" and not config.tied:
            self.embed_out = nn.Parameter(0.2 * torch.randn(config.vocab, self.width))
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_positions = nn.Module()
        self.embed_positions.register_buffer("_float_tensor", torch.zeros(1))

    def embed(self, tokens: torch.Tensor, dim: int) -> torch.Tensor:
        vectors = self.embed_tokens.weight[tokens, :dim]
        return vectors * math.sqrt(dim) + places(tokens, self.width)[..., :dim]


class SuperTransformer(nn.Module):
    """A SuperTransformer, of which `forward` runs a subnet that is named as HAT names it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        target = nn.Embedding(config.vocab, max(config.dec_embed), PAD)
        source = target
        if config.source_vocab is not None:
            source = nn.Embedding(config.source_vocab, max(config.enc_embed), PAD)
        self.encoder = Side(config, "encoder", source)
        self.decoder = Side(config, "decoder", target)

    def encode(
        self, source: torch.Tensor, hidden: torch.Tensor, setting: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Return the outputs of all layers; one that is skipped returns what it gets."""
        x = self.encoder.embed(source, setting["encoder_embed_dim"])
        states = []
        for i, layer in enumerate(self.encoder.layers):
            if i < setting["encoder_layer_num"]:
                heads = setting["encoder_self_attention_heads"][i]
                x = layer(x, setting["encoder_ffn_embed_dim"][i], (heads, hidden))
            states.append(x)
        if self.encoder.layer_norm is not None:  # of the last only
            states[-1] = normalised(self.encoder.layer_norm, x)
        return states

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, setting: dict[str, Any]
    ) -> torch.Tensor:
        hidden = torch.where(source == PAD, -math.inf, 0.0)[:, None, None]
        states = self.encode(source, hidden, setting)
        future = torch.full((target.shape[1],) * 2, -math.inf).triu(1)
        y = self.decoder.embed(target, setting["decoder_embed_dim"])
        for i in range(setting["decoder_layer_num"]):
            n = {-1: 1, 1: 2, 2: 3}[setting["decoder_arbitrary_ende_attn"][i]]
            memory = torch.cat(states[-1 : -1 - n : -1], 1)  # the last layer first
            heads = setting["decoder_self_attention_heads"][i]
            cross = setting["decoder_ende_attention_heads"][i]
            y = self.decoder.layers[i](
                y,
                setting["decoder_ffn_embed_dim"][i],
                (heads, future),
                (memory, cross, hidden.repeat(1, 1, 1, n)),
            )
        if self.decoder.layer_norm is not None:
            y = normalised(self.decoder.layer_norm, y)
        out = getattr(self.decoder, "embed_out", self.decoder.embed_tokens.weight)
        return F.linear(y, out[:, : y.shape[-1]])


def setting_of(subnet: Subnet) -> dict[str, Any]:
    """A subnet as HAT names it."""
    values = subnet.grouped()
    return {
        "encoder_embed_dim": values["enc_embed"],
        "decoder_embed_dim": values["dec_embed"],
        "encoder_layer_num": values["enc_depth"],
        "decoder_layer_num": values["dec_depth"],
        "encoder_ffn_embed_dim": values["enc_ffn"],
        "decoder_ffn_embed_dim": values["dec_ffn"],
        "encoder_self_attention_heads": values["enc_heads"],
        "decoder_self_attention_heads": values["dec_heads"],
        "decoder_ende_attention_heads": values["cross_heads"],
        "decoder_arbitrary_ende_attn": [{1: -1, 2: 1, 3: 2}.get(a, a) for a in values["attend"]],
    }


def pair(**changes: Any) -> tuple[ElasticTransformer, SuperTransformer]:
    """Our network, and HAT's of the same size, each with weights of its own."""
    torch.manual_seed(0)
    net = ElasticTransformer.tiny(**{**SIZES, **changes}).eval()
    return net, shaken(SuperTransformer(net.config))


def sentences(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target; padding is behind, before (as fairseq has it) and in between nowhere."""
    torch.manual_seed(1)
    source = torch.randint(3, config.source_vocab or config.vocab, (4, 7))
    target = torch.randint(3, config.vocab, (4, 5))
    target[:, 0] = EOS
    source[1, -3:] = PAD
    source[2, :4] = PAD
    target[3, -2:] = PAD
    return source, target


VARIANTS: dict[str, dict[str, Any]] = {
    "WMT: one table for everything": {},
    "IWSLT: tables and an output layer of their own": {"source_vocab": 13, "tied": False},
    "the target's table is the output layer": {"source_vocab": 13},
    "sides of different widths": {"source_vocab": 13, "tied": False, "dec_embed": (16, 32)},
    "odd widths": {"source_vocab": 13, "enc_embed": (15, 23)},
    "normalised before": {"norm_first": True, "attend": (1,)},
    "depths of the encoder": {"enc_depths": (1, 2, 3), "attend": (1,)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_hat(variant: str) -> None:
    net, theirs = pair(**VARIANTS[variant])
    source, target = sentences(net.config)
    net.load_hat(theirs.state_dict())
    space = net.search_space()
    outputs = []
    for subnet in [space.largest, space.smallest, *space.sample(6, 0)]:
        net.activate(subnet)
        with torch.no_grad():
            expected = theirs(source, target, setting_of(subnet))
            torch.testing.assert_close(net(source, target), expected, atol=3e-5, rtol=1e-5)
            plain = extract(net, subnet)
            torch.testing.assert_close(plain(source, target), expected, atol=3e-5, rtol=1e-5)
        outputs.append(expected.flatten())
    assert len(torch.stack(outputs).unique(dim=0)) == len(outputs)
    assert torch.stack(outputs).std() > 0.1  # logits that say something


def test_decoding_is_that_of_hat() -> None:
    net, theirs = pair(source_vocab=13, tied=False)
    net.load_hat(theirs.state_dict())
    source, _ = sentences(net.config)
    for subnet in net.search_space().sample(3, 0):
        net.activate(subnet)
        tokens = torch.full((len(source), 1), EOS)
        for _ in range(6):
            logits = theirs(source, tokens, setting_of(subnet))[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        assert not (tokens == PAD).any()
        assert torch.equal(net.generate(source, 6, stop=False), tokens[:, 1:])


def test_a_network_of_a_checkpoint_is_elastic_and_counts_what_it_has() -> None:
    net, theirs = pair(source_vocab=13, tied=False)
    net.load_hat(theirs.state_dict())
    inputs = sentences(net.config)
    check_elastic(net, inputs)
    space = net.search_space()
    subnets = [space.smallest, *space.sample(4, 0)]
    _, params, _ = (m.evaluate(space, space.indices(subnets))[0] for m in net.exact_measures())
    for n, subnet in zip(params, subnets, strict=True):
        assert n == sum(p.numel() for p in extract(net, subnet).parameters())


def test_a_whole_checkpoint_is_welcome() -> None:
    net, theirs = pair()
    arguments = argparse.Namespace(
        activation_fn="relu", vocab_original_scaling=False, encoder_normalize_before=False
    )
    net.load_hat({"args": arguments, "model": theirs.state_dict(), "epoch": 3})
    again = pair()[0]
    again.load_hat({"model": theirs.half().state_dict()})  # as training with fp16 leaves them
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor.half().float(), again.state_dict()[name]), name


# Bad input


def message(net: ElasticTransformer, state: Any) -> str:
    """The message, after proof that nothing was loaded."""
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SpaceError) as caught:
        net.load_hat(state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert_clear(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name", "theirs", "ours"),
    [
        ({"vocab": 30}, "encoder.embed_tokens.weight", (30, 24), (20, 24)),
        ({"enc_embed": (16, 32), "dec_embed": (16, 32)}, "encoder.embed_tokens.weight",
         (20, 32), (20, 24)),
        ({"qkv": 32}, "encoder.layers.0.self_attn.in_proj_weight", (96, 24), (48, 24)),
        ({"ffn": (16, 64)}, "encoder.layers.0.fc1.weight", (64, 24), (48, 24)),
    ],
)  # fmt: skip
def test_the_first_tensor_of_another_size_is_named_with_both_shapes(
    changes: dict[str, Any], name: str, theirs: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    text = message(pair()[0], pair(**changes)[1].state_dict())
    for part in (repr(name), f"is {theirs} in the state and {ours} here"):
        assert part in text


def test_a_checkpoint_of_other_depths() -> None:
    text = message(pair()[0], pair(dec_depths=(1, 4))[1].state_dict())
    assert "missing nothing; unknown 'decoder.layers.3." in text
    text = message(pair()[0], pair(enc_depths=(2,), attend=(1, 2))[1].state_dict())
    assert "missing 'encoder.layers.2.self_attn.in_proj_weight'" in text


def test_tables_that_are_shared_on_one_side_only() -> None:
    own, apart = pair(source_vocab=20)[1], pair(source_vocab=20, tied=False)[1]
    assert "Build the network with source_vocab=" in message(pair()[0], own.state_dict())
    assert "Build the network with tied=False" in message(pair()[0], apart.state_dict())
    net = pair(source_vocab=20, tied=False)[0]
    assert "Build the network with tied=True" in message(net, own.state_dict())


def test_what_is_not_a_checkpoint_of_hat() -> None:
    net, theirs = pair()
    assert "got a str, which is not a dictionary" in message(net, "super.pt")
    assert "'target.weight' is not a name of HAT" in message(net, net.state_dict())
    assert "'encoder.0.attention.q.weight' is not" in message(
        net, {k: v for k, v in net.state_dict().items() if k.startswith("encoder.")}
    )
    assert "'module.encoder.version' is not" in message(
        net, {f"module.{k}": v for k, v in theirs.state_dict().items()}
    )
    assert "'epoch' is not a name of HAT" in message(net, {"epoch": 3})
    assert "empty" in message(net, {})
    assert "empty" in message(net, {"model": {}})
    state = theirs.state_dict()
    state["encoder.embed_positions.weight"] = torch.zeros(9, 24)  # learned positions
    assert "unknown 'encoder.embed_positions.weight'" in message(net, state)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"positions": "paper", "bos": 0}, "positions='paper' of this network is 'fairseq' in HAT"),
        ({"pad": 0}, "pad=0 of this network is 1 in HAT"),
        ({"bos": 0}, "bos=0 of this network is 2 in HAT"),
        ({"enc_depths": (2, 3), "attend": (1, 2)}, "HAT attends to the last layer again"),
        ({"norm_first": True, "attend": (1, 2)}, "normalises the last encoder layer's output"),
    ],
)
def test_a_network_that_computes_otherwise_is_refused(
    changes: dict[str, Any], expected: str
) -> None:
    net, theirs = pair(**changes)
    assert expected in message(net, theirs.state_dict())


def test_those_that_are_refused_would_compute_otherwise() -> None:
    for changes in ({"enc_depths": (2, 3), "attend": (1, 2)}, {"norm_first": True}):
        net, theirs = pair(**changes)
        welcome = pair(**{**changes, "attend": (1,)})[0]  # the weights are the same
        welcome.load_hat(theirs.state_dict())
        net.load_state_dict(welcome.state_dict())
        source, target = sentences(net.config)
        space = net.search_space()
        for attend, equal in ((1, True), (2, False)):
            subnet = space.subnet({**space.smallest, "attend.0": attend})
            net.activate(subnet)
            with torch.no_grad():
                off = net(source, target) - theirs(source, target, setting_of(subnet))
            assert bool(off.abs().max() < 1e-4) is equal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_fn", "gelu"),
        ("vocab_original_scaling", True),
        ("no_token_positional_embeddings", True),
        ("decoder_normalize_before", True),
    ],
)
def test_arguments_that_the_weights_do_not_show(name: str, value: Any) -> None:
    net, theirs = pair()
    arguments = argparse.Namespace(**{name: value})
    text = message(net, {"args": arguments, "model": theirs.state_dict()})
    assert f"trained with {name}={value!r}" in text


# Sizes of its tasks


def test_sizes_of_its_tasks() -> None:
    with torch.device("meta"):
        plain = ElasticTransformer.hat_wmt14()
        german = ElasticTransformer.hat("wmt14.en-de")
        french = ElasticTransformer.hat("wmt14.en-fr", vocab=44_000)
        iwslt = ElasticTransformer.hat("iwslt14.de-en", vocab=6000, source_vocab=8000)
    assert german.search_space().choices == plain.search_space().choices
    assert {k: v.shape for k, v in german.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert french.target.weight.shape == (44_000, 640)
    assert iwslt.source.weight.shape == (8000, 640)
    assert iwslt.output.weight.shape == (6000, 640)
    largest = iwslt.search_space().largest.grouped()
    assert largest["dec_ffn"] == [2048] * 6
    assert largest["cross_heads"] == [4] * 6
    assert iwslt.search_space().smallest["enc_ffn.0"] == 512


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("wmt14.en-d", {}, "task='wmt14.en-d' is not one of .* Did you mean 'wmt14.en-de'"),
        ("wmt19.en-de", {}, "The sizes of wmt19.en-de are without 'vocab'"),
        ("iwslt14.de-en", {"vocab": 9}, "are without 'source_vocab'"),
    ],
)
def test_a_task_that_is_unknown_or_without_a_vocabulary(
    task: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpaceError, match=expected):
        ElasticTransformer.hat(task, **changes)


def test_sizes_are_compared_before_what_attends() -> None:
    net = ElasticTransformer.tiny(positions="fairseq", pad=1, bos=2, eos=2)
    state = {"encoder.embed_tokens.weight": torch.zeros(32768, 640)}
    text = message(net, {"model": state})
    assert "'encoder.embed_tokens.weight' is (32768, 640) in the state and (20, 24) here" in text
    assert "'encoder.version' is a str, not a tensor" in message(net, {"encoder.version": "3"})
