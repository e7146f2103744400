# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import extract
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.export.formats.onnx import onnx_session, to_onnx
from lightning_subnet.supernets._blocks.transformer_config import TransformerConfig
from lightning_subnet.supernets._blocks.transformer_layer import (
    ELASTIC,
    PLAIN,
    LayerSpec,
    Style,
    TransformerLayer,
    fairseq_places,
    fairseq_sinusoid,
    sinusoid,
)
from lightning_subnet.supernets.transformer import ElasticTransformer, Transformer
from tests.supernets.attention_contract import AttentionContract, shaken

tiny = ElasticTransformer.tiny


def tokens(net: Any, n: int, length: int, vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (n, length), generator=torch.Generator().manual_seed(length))


class TestTransformer(AttentionContract):
    SIZES: ClassVar = {
        "tiny": tiny,
        "hat": partial(
            tiny, source_vocab=13, norm_first=False, enc_depths=(3, 4), attend=(1, 2, 3)
        ),
        "fairseq": partial(
            tiny, source_vocab=13, dec_embed=(16, 32), tied=False, positions="fairseq",
            pad=1, bos=2, eos=2,
        ),
    }  # fmt: skip
    PLAIN = Transformer
    OTHER: ClassVar = {
        ("dec_depths", (1, 4)): r"'dec_ffn.3' is not a choice of this space",
        ("ffn", (16, 64)): r"'enc_ffn.0' cannot be 64",
    }

    def inputs_of(self, net: Any, n: int) -> tuple[torch.Tensor, ...]:
        config = net.config
        source = tokens(net, n, config.source_length, config.source_vocab or config.vocab)
        source[1:, -2:] = config.pad
        target = tokens(net, n, config.target_length, config.vocab)
        target[:, 0] = config.bos
        return source, target

    def loss(self, net: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        logits = net(*inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), inputs[1][:, 1:].flatten())

    def test_a_part_of_the_space_is_welcome(self) -> None:
        net = tiny()
        net.activate(tiny(attend=(1,), ffn=(32,)).search_space().largest)
        assert net.shape.attend == (1, 1, 1)


def test_the_space_of_hat() -> None:
    with torch.device("meta"):
        net = ElasticTransformer.hat_wmt14()
    space = net.search_space()
    encoder, decoder = 2 * (3 * 2) ** 6, 2 * sum((3 * 2 * 2 * 3) ** n for n in range(1, 7))
    assert space.size == encoder * decoder == 417_846_678_672_384  # about 10^15
    assert len(space.names) == 4 + 2 * 6 + 4 * 6
    draws = space.sample_indices(20_000, np.random.default_rng(0))
    began = time.perf_counter()
    macs, params, _ = (m.evaluate(space, draws)[0] for m in net.exact_measures())
    assert time.perf_counter() - began < 20  # 20,000 extractions would take hours
    ends = space.indices([space.smallest, space.largest])
    for values, m in zip((macs, params), net.exact_measures(), strict=False):
        low, high = m.evaluate(space, ends)[0]
        assert low <= values.min() < values.max() <= high


def test_parameters_are_those_of_the_transformer_of_vaswani() -> None:
    """Table 3, base: 65 million with a vocabulary of 37,000, its embeddings shared."""
    with torch.device("meta"):
        config = TransformerConfig(
            vocab=37_000, enc_embed=(512,), dec_embed=(512,), dec_depths=(6,), ffn=(2048,),
            heads=(4, 8), attend=(1,),
        )  # fmt: skip
        net = ElasticTransformer(config)
    space = net.search_space()
    _, params, _ = (
        m.evaluate(space, space.indices([space.largest]))[0] for m in net.exact_measures()
    )
    theirs = nn.Transformer(512, 8, 6, 6, 2048, batch_first=True, device="meta")
    final_norms = 2 * 2 * 512  # behind encoder and decoder in torch, nowhere in the paper
    assert params == sum(p.numel() for p in theirs.parameters()) - final_norms + 37_000 * 512
    assert 62e6 < params < 66e6


@pytest.mark.parametrize("kit", [PLAIN, ELASTIC])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_is_that_of_torch(kit: Any, norm_first: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_first": True, "norm_first": norm_first, "dropout": 0.0}
    theirs = nn.TransformerDecoderLayer(16, 4, 24, **options)
    style = Style(norm_first=norm_first, activation="relu")
    ours = TransformerLayer(kit, LayerSpec(16, 4, 24, 16, memory=16, cross_heads=4), style)
    shaken(theirs)
    copies = [(ours.attention, theirs.self_attn), (ours.cross, theirs.multihead_attn)]
    with torch.no_grad():
        for mine, other in copies:
            for layer, weight, bias in zip(
                (mine.q, mine.k, mine.v),
                other.in_proj_weight.chunk(3),
                other.in_proj_bias.chunk(3),
                strict=True,
            ):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            mine.out.load_state_dict(other.out_proj.state_dict())
    ours.inner.load_state_dict(theirs.linear1.state_dict())
    ours.outer.load_state_dict(theirs.linear2.state_dict())
    for mine, other in (
        (ours.attention_norm, theirs.norm1),
        (ours.cross_norm, theirs.norm2),
        (ours.feed_norm, theirs.norm3),
    ):
        mine.load_state_dict(other.state_dict())
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = theirs(x, memory, tgt_mask=future, memory_key_padding_mask=padding)
    got = ours(x, causal=True, memory=memory, memory_padding=padding)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_layer_attends_to_the_last_encoder_layers_one_behind_the_other() -> None:
    net = shaken(tiny(enc_depths=(3,), attend=(1, 2, 3)))
    space = net.search_space()
    source = tokens(net, 2, 5, 20)
    source[1, 3:] = 0
    memory = net.encode(source)
    assert [s.shape for s in memory.states] == [(2, 5, 24)] * 3
    states, padding = memory.last(2)
    assert torch.equal(states, torch.cat(memory.states[1:], 1))
    assert torch.equal(padding, torch.cat([source == 0] * 2, 1))
    changes = {f"attend.{i}": 1 for i in range(3)}
    net.activate(space.subnet({**space.largest, **changes}))
    assert len(net.encode(source).states) == 1  # no more than somebody looks at


def test_padding_of_the_source_and_the_future_of_the_target_have_no_influence() -> None:
    net = shaken(tiny())
    source, target = tokens(net, 1, 5, 20), tokens(net, 1, 6, 20)
    longer = F.pad(source, (0, 4), value=net.config.pad)
    later = torch.cat([target[:, :4], tokens(net, 1, 2, 20)], 1)
    with torch.no_grad():
        torch.testing.assert_close(net(longer, target), net(source, target), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(source, later)[:, :4], net(source, target)[:, :4])


def test_positions_are_those_of_the_paper() -> None:
    table = sinusoid(20, 8)
    assert table.shape == (20, 8)
    torch.testing.assert_close(table[7, 4], torch.tensor(7 / 10_000 ** (4 / 8)).sin())
    torch.testing.assert_close(table[7, 5], torch.tensor(7 / 10_000 ** (4 / 8)).cos())
    assert sinusoid(3, 5).shape == (3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (3,)}, "heads=3 does not divide qkv=16"),
        ({"attend": (1, 3)}, r"attend=\(1, 3\) needs 3 encoder layers; the shallowest .* has 2"),
        ({"dec_depths": ()}, r"dec_depths=\(\) must be positive integers"),
        ({"ffn": (16, 16)}, r"ffn=\(16, 16\) must be positive integers, each once"),
        ({"enc_embed": (0, 8)}, r"enc_embed=\(0, 8\) must be positive integers"),
        ({"qkv": 0}, "qkv=0 must be a positive integer"),
        ({"vocab": 2.5}, "vocab=2.5 must be a positive integer"),
        ({"source_vocab": -1}, "source_vocab=-1 must be a positive integer"),
        ({"eos": 1}, r"pad, bos and eos are \(0, 1, 1\): three tokens"),
        ({"eos": 0, "positions": "fairseq"}, r"pad, bos and eos are \(0, 1, 0\): three tokens"),
        ({"positions": "fairsek"}, r"'fairsek' is not one of 'paper', .* Did you mean 'fairseq'"),
        ({"vocab": 2}, "three tokens of the 2 are needed"),
        ({"target_length": 99}, "target_length=99 must fit into max_length=16"),
        ({"dropout": 1.5}, r"dropout=1.5 must be a share in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        tiny(**changes)


def test_inputs_that_do_not_fit() -> None:
    net = tiny()
    good = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ElasticityError, match="17 tokens are more than the 16 positions"):
        net(torch.ones(1, 17, dtype=torch.long), good)
    with pytest.raises(ElasticityError, match=r"Tokens are integers .* not \(1, 3\) torch.float32"):
        net(good, good.float())
    with pytest.raises(ElasticityError, match=r"not \(3,\) torch.int64"):
        net(good[0], good)
    with pytest.raises(ElasticityError, match=r"of torch.int64 or torch.int32, not .* torch.bool"):
        net(good > 0, good)
    with pytest.raises(ElasticityError, match=r"not \(1, 3\) torch.uint8"):
        net(good.to(torch.uint8), good)
    with pytest.raises(
        ElasticityError, match=r"are \(1, 0\): a sequence .* has one token at least"
    ):
        net(good, good[:, :0])
    with pytest.raises(ElasticityError, match="source has 3 sequences, and the target 1"):
        net(good.T, good)
    with pytest.raises(ElasticityError, match="source has 1 sequences, and the target 3"):
        net(good, good.T)
    with pytest.raises(
        ElasticityError, match=r"n_steps=0 must be .* from 1. It is a number of tokens"
    ):
        net.generate(good, 0)
    with pytest.raises(SpaceError, match=r"activation='rely' .* Did you mean 'relu'"):
        Style(activation="rely")


@pytest.mark.parametrize(("token", "row"), [(20, "from 1 to 20"), (-1, "from -1 to 1")])
def test_a_token_that_is_not_in_the_vocabulary(token: int, row: str) -> None:
    net = tiny()
    plain = extract(net, net.search_space().smallest)
    good = torch.ones(2, 3, dtype=torch.long)
    bad = good.clone()
    bad[1, 2] = token
    for module in (net, plain):
        for source, target in ((bad, good), (good, bad)):
            with pytest.raises(ElasticityError, match=f"Tokens are {row}.* has 20: 0 to 19"):
                module(source, target)
    assert net(good.int(), good.int()).shape == (2, 3, 20)


def test_tokens_that_run_out_of_positions_while_decoding() -> None:
    net = tiny().eval()
    source = torch.ones(1, 3, dtype=torch.long)
    assert net.generate(source, 16, stop=False).shape == (1, 16)
    with pytest.raises(ElasticityError, match="17 tokens are more than the 16 positions"):
        net.generate(source, 17, stop=False)


@pytest.mark.parametrize("positions", ["paper", "fairseq"])
def test_an_extraction_is_traced_and_its_batch_stays_open(positions: str) -> None:
    net = shaken(tiny(positions=positions, pad=1, bos=0, tied=False))
    plain = extract(net, net.search_space().sample(1, 0)[0])
    source, target = tokens(net, 2, 7, 20), tokens(net, 2, 5, 20)
    source[1, 4:] = 1
    session = onnx_session(to_onnx(plain, (source, target), exporter="trace"))
    more = {"source": torch.cat([source.flip(0), source]), "target": torch.cat([target, target])}
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in more.items()})
    torch.testing.assert_close(torch.from_numpy(logits), plain(**more), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [8, 9])
def test_positions_of_fairseq(dim: int) -> None:
    table = fairseq_sinusoid(20, dim, 1)
    assert table.shape == (20, dim)
    half = dim // 2  # the steps go from 1 to 1 / 10,000, both included
    for row in (0, 2, 7):
        for i in range(half):
            angle = torch.tensor(row / 10_000 ** (i / (half - 1)))
            torch.testing.assert_close(table[row, i], angle.sin())
            torch.testing.assert_close(table[row, half + i], angle.cos())
    assert not table[1].any()
    assert not table[:, 2 * half :].any()
    tokens = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    assert fairseq_places(tokens, 1).tolist() == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4]]


def test_padding_before_a_sentence_of_fairseq_has_no_influence() -> None:
    net = shaken(tiny(positions="fairseq", pad=1, bos=2, eos=2))
    source, target = tokens(net, 1, 5, 20), tokens(net, 1, 6, 20)
    for sides in ((4, 0), (0, 4), (2, 2)):
        longer = F.pad(source, sides, value=1)
        with torch.no_grad():
            torch.testing.assert_close(net(longer, target), net(source, target), atol=1e-5, rtol=0)


def test_a_shared_table_is_as_wide_as_the_wider_side() -> None:
    net = tiny()
    space = net.search_space()
    for enc, dec in ((16, 16), (16, 24), (24, 16)):
        subnet = space.subnet({**space.largest, "enc_embed": enc, "dec_embed": dec})
        assert extract(net, subnet).target.weight.shape == (20, max(enc, dec))
    own = tiny(source_vocab=13)
    subnet = space.subnet({**space.largest, "enc_embed": 16, "dec_embed": 24})
    plain = extract(own, subnet)
    assert (plain.source.weight.shape, plain.target.weight.shape) == ((13, 16), (20, 24))
