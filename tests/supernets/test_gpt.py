# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_subnet import extract
from lightning_subnet.errors import ElasticityError, SpaceError
from lightning_subnet.supernets.gpt import GPT, ElasticGPT
from tests.problems import data_file
from tests.supernets.attention_contract import AttentionContract, shaken

small = partial(ElasticGPT.tiny, vocab=20, context=12, embed=(16, 24), mlp_ratios=(1, 2))


class TestGPT(AttentionContract):
    SIZES: ClassVar = {
        "grouped": partial(small, depths=(1, 2, 3)),
        "as many": partial(small, kv_heads=(), heads=(1, 2, 4), depths=(2, 3)),
        "own head dimension": partial(small, head_dim=8, heads=(1, 2, 3), kv_heads=(1,)),
        "no bias": partial(small, bias=(False,), depths=(1, 2)),
    }
    PLAIN = GPT
    OTHER: ClassVar = {
        ("depths", (2, 4)): r"'heads.3' is not a choice of this space",
        ("heads", (2, 8)): r"'heads.0' cannot be 8",
        ("kv_heads", ()): r"'kv_heads.0'",
    }

    def inputs_of(self, net: Any, n: int) -> tuple[torch.Tensor, ...]:
        rng = torch.Generator().manual_seed(0)
        return (torch.randint(net.config.vocab, (n, net.config.context), generator=rng),)

    def loss(self, net: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        logits = net(*inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), inputs[0][:, 1:].flatten())


def test_the_default_is_the_space_of_hw_gpt_bench() -> None:
    with torch.device("meta"):
        net = ElasticGPT()
    space = net.search_space()
    assert space.size == 3 * 2 * sum(9**n for n in (10, 11, 12))
    _, params, _ = (
        m.evaluate(space, space.indices([space.largest]))[0][0] for m in net.exact_measures()
    )
    assert params == 124_439_808  # GPT-2 small, as it was released


def test_parameters_are_those_that_hw_gpt_bench_counted_for_all_10000_subnets() -> None:
    with np.load(data_file("hwgpt_s.npz")) as data:
        embed, depth, bias = data["embed_dim"], data["n_layer"], data["bias"]
        heads, ratio, theirs = data["n_head"], data["mlp_ratio"], data["params"]
    with torch.device("meta"):
        net = ElasticGPT()
    space = net.search_space()
    X = np.zeros((len(embed), len(space.names)), np.int64)
    columns = {"embed": embed, "depth": depth, "bias": bias}
    columns |= {f"heads.{i}": heads[:, i] for i in range(12)}
    columns |= {f"mlp.{i}": ratio[:, i] for i in range(12)}
    for name, values in columns.items():
        allowed = np.array(space.choices[name].values)
        X[:, space.names.index(name)] = (values[:, None] == allowed).argmax(1)
    X = space.indices(space.from_indices(X))
    ours = net.exact_measures()[1].evaluate(space, X)[0]
    # Theirs has an output layer of its own, 50,254 tokens, no table of positions, and a gated
    # feed-forward part, that is, a third matrix of embed x (ratio * embed) with its bias.
    wide = np.where(np.arange(12) < depth[:, None], ratio, 0).sum(1).astype(float) * embed
    ours += (2 * 50_254 - 50_257 - 1024) * embed.astype(float) + wide * (embed + bias)
    assert len(ours) == 10_000
    assert np.array_equal(ours, theirs)


def test_generating_with_a_cache_is_generating_without() -> None:
    net = shaken(small())
    space = net.search_space()
    prompt = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(1))
    for subnet in [space.smallest, space.largest, *space.sample(6, 0)]:
        net.activate(subnet)
        got = net.generate(prompt, 7)
        whole = prompt
        with torch.no_grad():
            for _ in range(7):
                whole = torch.cat([whole, net(whole)[:, -1:].argmax(-1)], 1)
            caches = net.caches()
            parts = [net(part, caches) for part in whole.split([4, 1, 3, 3], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), net(whole), atol=1e-5, rtol=1e-5)
        assert torch.equal(got, whole[:, 4:])
        assert torch.equal(extract(net, subnet).generate(prompt, 7), got)


def test_drawing_is_reproducible_and_cold_draws_are_the_likeliest() -> None:
    net = shaken(small())
    prompt = torch.randint(20, (4, 3))
    draw = [
        net.generate(prompt, 8, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    cold = net.generate(prompt, 8, temperature=1e-4)
    assert torch.equal(cold, net.generate(prompt, 8))
    first = int(cold[0, 2])
    ended = net.generate(prompt[:1], 8, stop=first)
    at = cold[0].tolist().index(first)
    assert ended.tolist() == [cold[0, : at + 1].tolist()]


def test_past_its_positions_it_says_so_at_once() -> None:
    net = small()
    prompt = torch.zeros(1, 6, dtype=torch.long)
    assert net.generate(prompt, 7).shape == (1, 7)  # the last token is not read
    with pytest.raises(ElasticityError, match=r"6 tokens and 8 more .* 12 positions.* last 5 of"):
        net.generate(prompt, 8)
    with pytest.raises(ElasticityError, match="13 tokens are more than the 12 positions"):
        net(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ElasticityError, match="temperature=-1 must be finite and at least 0"):
        net.generate(prompt, 1, temperature=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (5,)}, "heads=5 does not divide embed=16"),
        ({"kv_heads": (3,)}, "kv_heads=3 does not divide heads=2"),
        ({"embed": (16, 16)}, r"embed=\(16, 16\) must be positive integers, each once"),
        ({"mlp_ratios": (0.5,)}, r"mlp_ratios=\(0.5,\) must be positive integers"),
        ({"dropout": -1}, "dropout=-1 must be a share"),
        ({"bias": ()}, r"bias=\(\) must be \(False, True\)"),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 3), 65), "Tokens are from 65 to 65, but the table has 65: 0 to 64"),
        (torch.full((1, 3), -1), "Tokens are from -1 to -1, but the table has 65"),
        (torch.zeros(1, 3), r"Tokens are integers .* not \(1, 3\) torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"not \(3,\) torch.int64"),
        (torch.zeros(1, 0, dtype=torch.long), r"Tokens are \(1, 0\): a sequence"),
    ],
)
def test_tokens_that_are_none(bad: torch.Tensor, message: str) -> None:
    net = ElasticGPT.tiny().eval()
    for module in (net, extract(net, net.search_space().smallest)):
        with pytest.raises(ElasticityError, match=message):
            module(bad)
        with pytest.raises(ElasticityError, match=message):
            module.generate(bad, 2)
