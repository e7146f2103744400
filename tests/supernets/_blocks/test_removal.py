# SPDX-License-Identifier: Apache-2.0
"""Blocks taken out of lists: a small model in the style of transformers, with config and cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet.supernets._blocks.skips import SkippedBlock, Skips

TOKENS = torch.tensor([[1, 5, 2, 7, 3]])


class Config:
    def __init__(self, **values: Any) -> None:
        self.num_hidden_layers, self.n_heads, self.layer_types = 4, 4, ["full"] * 4
        self.scales = False
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Cache:
    """Keys and values by layer; it tells its length by the first of them."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.places[0][0].shape[1] if 0 in self.places else 0

    def update(
        self, k: torch.Tensor, v: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if index in self.places:
            k, v = (
                torch.cat([old, new], 1)
                for old, new in zip(self.places[index], (k, v), strict=True)
            )
        self.places[index] = k, v
        return k, v


class Attention(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.kind = layer_idx, config.layer_types[layer_idx]
        self.scale = 1 / (layer_idx + 1) if config.scales else 1.0
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, cache: Cache | None, rope: Any) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = q * rope[0] + rope[1], k * rope[0] + rope[1]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        scores = self.scale * (q @ k.transpose(1, 2))
        hidden = torch.ones(q.shape[1], k.shape[1]).triu(k.shape[1] - q.shape[1] + 1).bool()
        if self.kind == "near":
            hidden = hidden | ~torch.ones_like(hidden).triu(k.shape[1] - q.shape[1] - 1)
        return self.out(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)


class Layer(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(8), Attention(config, layer_idx)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        use_cache: bool = False,
        position_embeddings: Any = None,
    ) -> tuple[torch.Tensor, Cache | None]:
        x = hidden_states
        x = x + self.self_attn(self.norm(x), cache if use_cache else None, position_embeddings)
        return x + self.down(self.up(x).relu()), cache


class Decoder(nn.Module):
    """It is made of a config, reads its layers by it, and counts positions by its cache."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(8, 9)

    def save_pretrained(self) -> tuple[Config, dict[str, torch.Tensor]]:
        return copy.deepcopy(self.config), self.state_dict()

    @classmethod
    def from_pretrained(cls, saved: tuple[Config, dict[str, torch.Tensor]]) -> Decoder:
        model = cls(saved[0])
        model.load_state_dict(saved[1])
        return model.eval()

    def forward(
        self, ids: torch.Tensor, cache: Cache | None = None, use_cache: bool = True
    ) -> dict[str, Any]:
        cache = Cache() if use_cache and cache is None else cache
        past = cache.get_seq_length() if cache is not None else 0
        x = self.embed(ids)
        angle = (torch.arange(ids.shape[1]) + past)[:, None] * torch.ones(8)
        rope = (angle.cos(), angle.sin())
        for layer in self.layers[: self.config.num_hidden_layers]:  # type: ignore[index] # a list
            x, cache = layer(x, cache=cache, use_cache=use_cache, position_embeddings=rope)
        return {"logits": self.head(x), "cache": cache}


def generated(model: nn.Module, *, cached: bool) -> torch.Tensor:
    """Return the logits of four greedy steps."""
    ids, cache, logits = TOKENS, None, []
    with torch.no_grad():
        for _ in range(4):
            new = ids if cache is None else ids[:, -1:]
            output = model(new, cache=cache, use_cache=cached)
            cache = output["cache"] if cached else None
            logits.append(output["logits"][:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(logits)


def decoder(**values: Any) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(Config(**values)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_without_layers(use_cache: bool) -> None:
    """Also if the example was without a cache."""
    model = decoder()
    skips = Skips.find(model, {"ids": TOKENS, "use_cache": use_cache})
    names = [f"layers.{i}" for i in range(4)]
    assert (skips.names, skips.refused) == (names, {})
    whole = generated(model, cached=True)
    assert torch.allclose(whole, generated(model, cached=False), atol=1e-5)
    for subset in (names[:1], names[1:], names[1:3], [names[0], names[2]]):
        skips.put(model, subset)
        small = skips.extract(model, subset)
        shorter = skips.extract(model, subset, remove=True)
        right = generated(model, cached=False)
        assert not torch.allclose(right, whole, atol=1e-3)
        for net in (model, small, shorter):
            assert torch.allclose(generated(net, cached=True), right, atol=1e-5), subset
            assert torch.allclose(generated(net, cached=False), right, atol=1e-5), subset
        assert isinstance(shorter, Decoder)
        n = 4 - len(subset)
        assert not any(isinstance(m, SkippedBlock) for m in shorter.modules())
        assert (
            shorter.config.to_dict()
            == Config(num_hidden_layers=n, layer_types=["full"] * n).to_dict()
        )
        again = Decoder.from_pretrained(shorter.save_pretrained())
        assert torch.equal(again(TOKENS)["logits"], model(TOKENS)["logits"])
        numbers = [layer.self_attn.layer_idx for layer in shorter.layers]  # type: ignore[union-attr] # a layer
        assert numbers == list(range(n))
    skips.put(model, [])
    assert torch.equal(generated(model, cached=True), whole)
    assert model.config.to_dict() == Config().to_dict()


def test_a_cache_of_layers_of_several_kinds_keeps_the_first_of_each() -> None:
    kinds = ["near", "full", "near", "full"]
    model = decoder(layer_types=kinds)
    skips = Skips.find(model, TOKENS)
    assert skips.names == ["layers.2", "layers.3"]
    assert skips.refused == {
        f"layers.{i}": f"is the first of kind {kind!r}, by which a cache tells its length"
        for i, kind in enumerate(kinds[:2])
    }
    skips.put(model, ["layers.2"])
    shorter: Any = skips.extract(model, ["layers.2"], remove=True)
    assert shorter.config.layer_types == ["near", "full", "full"]
    for net in (model, skips.extract(model, ["layers.2"]), shorter):
        assert torch.allclose(
            generated(net, cached=True), generated(model, cached=False), atol=1e-5
        )


def test_layers_that_a_config_would_make_in_another_way_are_not_taken_out() -> None:
    """The scale of each layer goes by its place."""
    model = decoder(scales=True)
    skips = Skips.find(model, TOKENS)
    for subset, out in ((["layers.1"], False), (["layers.3"], True)):
        skips.put(model, subset)
        small: Any = skips.extract(model, subset, remove=True)
        assert torch.equal(small(TOKENS)["logits"], model(TOKENS)["logits"])
        assert small.config.num_hidden_layers == 4 - out
        assert any(isinstance(m, SkippedBlock) for m in small.modules()) != out


class Looks(nn.Module):
    """It needs its second layer, whatever is skipped; a number of its own counts the others."""

    def __init__(self, needs: bool) -> None:
        super().__init__()
        self.config = Config()
        self.blocks = nn.ModuleList(Layer(self.config, i) for i in range(3))
        self.n_blocks, self.needs = 3, needs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.blocks[1].self_attn.scale if self.needs else x  # type: ignore[union-attr, operator] # a layer
        for i in range(self.n_blocks):
            x = self.blocks[i](x, position_embeddings=(1.0, 0.0))[0]
        return x


@pytest.mark.parametrize("needs", [False, True])
def test_a_network_that_needs_its_layers_keeps_what_stands_for_them(needs: bool) -> None:
    torch.manual_seed(0)
    net, x = Looks(needs).eval(), torch.randn(1, 5, 8)
    skips = Skips.find(net, x)
    assert skips.names == ["blocks.0", "blocks.1", "blocks.2"]
    subset = ["blocks.1", "blocks.2"]
    skips.put(net, subset)
    for remove in (False, True):
        small: Any = skips.extract(net, subset, remove=remove)
        assert torch.equal(small(x), net(x))
        assert len(small.blocks) == (1 if remove and not needs else 3)
        assert small.n_blocks == len(small.blocks)


def test_blocks_of_one_tensor_are_taken_out_only_if_asked() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x).relu()

    net, x = nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 2)), torch.randn(2, 4)
    skips = Skips.find(net, x)
    skips.put(net, ["1"])
    stands = skips.extract(net, ["1"])
    assert type(stands.get_submodule("1")) is nn.Identity
    gone: Any = skips.extract(net, ["1"], remove=True)
    assert [type(m).__name__ for m in gone] == ["Linear", "Block", "Linear"]
    assert torch.equal(stands(x), net(x))
    assert torch.equal(gone(x), net(x))
