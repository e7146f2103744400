# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lightning_subnet import Latency, extract
from lightning_subnet._torch.macs import count_macs
from lightning_subnet.errors import ElasticityError
from lightning_subnet.supernets import Decoding, ElasticDecoding, ElasticGPT, ElasticTransformer
from lightning_subnet.supernets.decoding import beam_search
from tests.supernets.attention_contract import shaken

STEPS = 4


def network(vocab: int = 5, seed: int = 0, sure: float = 3.0) -> Any:
    torch.manual_seed(seed)
    net = shaken(ElasticTransformer.tiny(vocab=vocab))
    with torch.no_grad():  # a decided opinion, which depends on the source
        net.target.weight.mul_(sure)
    return net


def sources(net: Any, n: int = 3) -> torch.Tensor:
    source = torch.randint(3, net.config.vocab, (n, 6), generator=torch.Generator().manual_seed(4))
    source[1:, 4:] = net.config.pad
    return source


def log_probability(net: Any, source: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """The sums over the tokens of sequences (n, length), by a forward pass without a cache."""
    target = torch.cat([torch.full((len(said), 1), net.config.bos), said[:, :-1]], 1)
    with torch.no_grad():
        logs = net(source.expand(len(said), -1), target).log_softmax(-1)
    return logs.gather(2, said[..., None]).sum((1, 2))


def sequences(vocab: int, eos: int) -> list[tuple[int, ...]]:
    """All that can be said in STEPS tokens: an end only at the end."""
    others = [t for t in range(vocab) if t != eos]
    ended = [(*words, eos) for n in range(STEPS) for words in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=STEPS))


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(penalty: float) -> None:
    net = network()
    source, eos = sources(net), net.config.eos
    found, scores = net.beam(source, STEPS, beam=5**STEPS, length_penalty=penalty)
    every = sequences(5, eos)
    assert len(every) == 4**4 + 1 + 4 + 16 + 64
    for row in range(len(source)):
        values = {}
        for length in range(1, STEPS + 1):
            group = [said for said in every if len(said) == length]
            logs = log_probability(net, source[row], torch.tensor(group)) / length**penalty
            values |= dict(zip(group, logs.tolist(), strict=True))
        best = max(values, key=lambda said: values[said])
        padded = [*best, *[net.config.pad] * (found.shape[1] - len(best))]
        assert found[row].tolist() == padded
        assert float(scores[row]) == pytest.approx(values[best], abs=1e-4)


@pytest.mark.parametrize("beam", [1, 2, 3])
def test_the_score_of_a_narrow_beam_is_the_probability_of_what_it_says(beam: int) -> None:
    net = network(vocab=12, seed=1)
    source = sources(net, 5)
    for subnet in net.search_space().sample(3, 0):
        net.activate(subnet)
        found, scores = net.beam(source, 7, beam=beam, length_penalty=0.6)
        for row in range(len(source)):
            said = found[row]
            ends = (said == net.config.eos).nonzero()
            said = said[: int(ends[0]) + 1] if len(ends) else said
            log = float(log_probability(net, source[row], said[None]))
            assert float(scores[row]) == pytest.approx(log / len(said) ** 0.6, abs=1e-4)


def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse_here() -> None:
    net = network(vocab=12, seed=2, sure=1.0)
    source = sources(net, 6)
    greedy = net.generate(source, 8)
    found, narrow = net.beam(source, 8, beam=1, length_penalty=0.0)
    assert torch.equal(found, greedy)
    _, wide = net.beam(source, 8, beam=12**2, length_penalty=0.0)
    assert (wide >= narrow - 1e-5).all()
    assert (wide > narrow + 1e-3).any()


def test_decoding_with_a_cache_is_decoding_without() -> None:
    net = network(vocab=12)
    source, config = sources(net), net.config
    for subnet in [net.search_space().smallest, *net.search_space().sample(5, 1)]:
        net.activate(subnet)
        said = torch.full((3, 1), config.bos)
        with torch.no_grad():
            memory, caches = net.encode(source), net.caches()
            for i in range(8):
                whole = net(source, said)
                new = net.decode(said[:, i:], memory, caches)
                torch.testing.assert_close(new[:, -1], whole[:, -1], atol=1e-5, rtol=1e-5)
                said = torch.cat([said, whole[:, -1:].argmax(-1)], 1)
        assert torch.equal(net.generate(source, 8, stop=False), said[:, 1:])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    net = network(vocab=12, seed=3)
    source = sources(net, 4)
    together, scores = net.beam(source, 6, beam=3)
    for row in range(4):
        alone, score = net.beam(source[row : row + 1], 6, beam=3)
        end = alone.shape[1]
        assert torch.equal(alone[0], together[row, :end])
        torch.testing.assert_close(score[0], scores[row])


def test_an_end_is_followed_by_padding_and_ends_early() -> None:
    table = torch.full((6, 6), -9.0)
    for one, next_one in ((1, 3), (3, 2), (4, 5), (5, 2)):  # 1 3 end; 4 5 end
        table[one, next_one] = 9.0

    def step(new: torch.Tensor) -> torch.Tensor:
        return table[new[:, -1]]

    first = torch.tensor([[1], [4]])
    tokens, scores = beam_search(step, lambda rows: None, first, 5, beam=2, stop=2)
    assert tokens.tolist() == [[3, 2], [5, 2]]
    assert scores.shape == (2,)
    first = torch.tensor([[3], [4]])
    tokens, _ = beam_search(step, lambda rows: None, first, 5, beam=1, stop=2)
    assert tokens.tolist() == [[2, 0], [5, 2]]


@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_a_network_as_it_is_used(kind: str) -> None:
    net = shaken(ElasticTransformer.tiny() if kind == "transformer" else ElasticGPT.tiny(vocab=20))
    decoding = ElasticDecoding(net, 5)
    space = decoding.search_space()
    assert space == net.search_space()
    tokens = torch.randint(3, 20, (2, 6))
    subnet = space.sample(1, 3)[0]
    plain = extract(decoding, subnet)
    assert type(plain) is Decoding
    assert plain.sliced
    assert not any("Elastic" in type(m).__name__ for m in plain.modules())
    decoding.activate(subnet)
    assert net.active_subnet == decoding.active_subnet == subnet
    assert torch.equal(plain(tokens), decoding(tokens))
    assert plain(tokens).shape == (2, 5)
    decoding.activate(space.smallest)
    few = count_macs(decoding, tokens[:1])
    assert count_macs(ElasticDecoding(net, 10), tokens[:1]) > few
    decoding.activate(space.largest)
    assert count_macs(decoding, tokens[:1]) > few
    latency = Latency(seconds=0.0).bind(decoding, tokens[:1])
    (small, _), (large, _) = latency([space.smallest, space.largest])
    assert 0 < small < large


def test_decoding_step_by_step_is_counted_by_what_each_step_does() -> None:
    net = ElasticTransformer.tiny(norm_first=False).eval()
    net.activate(net.search_space().largest)
    config, d, q = net.config, 24, 16
    s, steps, ffn, n_layers, attend = 6, 5, 48, 3, 2
    own = sum(4 * d * q + 2 * t * q for t in range(1, steps + 1))
    cross = 2 * attend * s * d * q + steps * (2 * d * q + 2 * attend * s * q)
    decoder = n_layers * (own + cross + steps * 2 * d * ffn) + steps * d * config.vocab
    encoder = 2 * (s * (4 * d * q + 2 * d * ffn) + 2 * s * s * q)
    assert count_macs(Decoding(net, steps), torch.ones(1, s, dtype=torch.long)) == encoder + decoder


def test_what_cannot_decode_is_refused() -> None:
    with pytest.raises(ElasticityError, match="Linear has no generate"):
        Decoding(torch.nn.Linear(1, 1), 3)
    net = ElasticTransformer.tiny()
    for steps in (0, 2.5, True):
        with pytest.raises(ElasticityError, match=r"must be .* from 1. It is a number of tokens"):
            ElasticDecoding(net, steps)
    with pytest.raises(ElasticityError, match=r"beam=0 must be .* from 1. A beam of 1 is greedy"):
        net.beam(torch.ones(1, 2, dtype=torch.long), 3, beam=0)
