# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of winners hold their subnet, and another project rebuilds them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchSpace, elastic, elasticize, load_subnet, save_subnet
from lightning_subnet.elasticity.channels.slices import is_sliced
from lightning_subnet.errors import SearchError
from lightning_subnet.results import subnet_record
from lightning_subnet.supernets import ElasticMobileNetV3
from tests.networks import Digits, LitMlp, quiet_trainer, search
from tests.problems import assert_clear
from tests.results.mobile import LitMobile, searched


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, width), nn.Linear(width, 16)
        self.heads = 4

    def forward(self, x: torch.Tensor, mask: Any = None) -> tuple[torch.Tensor, None]:
        return x + self.down(F.gelu(self.up(self.norm(x)))), None


class Net(nn.Module):
    """Blocks in a list, in which inner widths and depth may vary; the classes are at the end."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x, _ = block(x, mask=None)
        return self.head(x)


class LitNet(LitMlp):
    """The same around an ordinary network."""

    def __init__(self, width: int = 32, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Net(width)  # type: ignore[assignment] # in place of the elastic one


def tuned(module: L.LightningModule, path: Path) -> None:
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, Digits())
    trainer.save_checkpoint(path)


def same(one: nn.Module, other: nn.Module) -> bool:
    x = torch.randn(5, 64)
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


@pytest.fixture(name="winner", scope="module")
def _winner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Return a fine-tuned winner of an elasticized network, its evaluation and checkpoint."""
    model = LitNet()
    elasticize(model.net, torch.randn(2, 64))
    result = search().fit(model, Digits(), progress=False)
    space = model.net.search_space()
    values = {**{n: v[0] for n, v in space.values.items()}, "keep.0": 1, "keep.2": 1}
    subnet = space.subnet(values)
    module = result.to_module(model, subnet)
    path = tmp_path_factory.mktemp("winner") / "tuned.ckpt"
    tuned(module, path)
    return module, result, path


def test_a_winner_is_rebuilt_from_its_checkpoint(winner: tuple[Any, Any, Path]) -> None:
    module, _, path = winner
    again = load_subnet(path, LitNet)
    assert type(again) is LitNet
    assert len(again.net.blocks) == 2
    assert again.net.blocks[0].up.out_features == 8
    assert same(again, module)
    assert not any(map(is_sliced, again.modules()))
    assert not hasattr(again.net, "search_space")
    record = subnet_record(path)
    assert record["subnet"] == subnet_record(module)["subnet"]
    assert record["subnet"]["keep.1"] == 0
    assert "torch" in record["versions"]


def test_the_network_alone_is_rebuilt_too(winner: tuple[Any, Any, Path]) -> None:
    module, _, path = winner
    again = load_subnet(path, Net)
    assert type(again) is Net
    assert same(again, module.net)

    def elastic_already() -> nn.Module:
        return elasticize(Net(), torch.randn(2, 64))

    assert same(load_subnet(path, elastic_already), module.net)


def test_what_was_loaded_goes_on(winner: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, _, path = winner
    again = load_subnet(path, LitNet)
    tuned(again, tmp_path / "more.ckpt")
    assert same(load_subnet(tmp_path / "more.ckpt", LitNet), again)
    copied = copy.deepcopy(again)
    tuned(copied, tmp_path / "copied.ckpt")
    assert same(load_subnet(tmp_path / "copied.ckpt", LitNet), copied)


def test_measured_values_are_in_the_record(winner: tuple[Any, Any, Path]) -> None:
    _, result, _ = winner
    best = result.best("val_acc")
    assert subnet_record(result.extract(best))["values"] == pytest.approx(best.values)


def test_a_checkpoint_of_another_model_is_refused(
    winner: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    _, _, path = winner

    def fails(match: str, path: Path, model: Any, **options: Any) -> None:
        with pytest.raises(SearchError, match=match) as error:
            load_subnet(path, model, **options)
        assert_clear(error)

    fails(r"another model than Net.*'blocks\.2\.up", path, lambda: Net(blocks=2))
    fails(r"another model than Sequential", path, lambda: nn.Sequential(nn.Linear(64, 10)))
    fails("makes one: load_subnet", path, Net())

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 12)

    fails(r"'head\.weight' is \(10, 16\) there and \(12, 16\) here", path, Wide)

    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    fails(r"has no 'extra\.weight' \(2, 2\)", path, More)
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    fails("holds no subnet", tmp_path / "plain.ckpt", Net)
    torch.save({"state_dict": {}, "hyper_parameters": {"net": Net()}}, tmp_path / "objects.ckpt")
    fails("weights_only=False", tmp_path / "objects.ckpt", Net)
    fails("has no subnet.json", tmp_path, Net)
    with pytest.raises(SearchError, match="is not a subnet"):
        save_subnet(Net(), tmp_path / "new")


def test_subnets_of_own_super_networks(tmp_path: Path) -> None:
    model, result = searched()
    best = result.best("val_acc")
    module = result.to_module(model, best)
    tuned(module, tmp_path / "tuned.ckpt")
    again = load_subnet(tmp_path / "tuned.ckpt", LitMobile)
    assert type(again.net).__name__ == "MobileNetV3"
    assert same(again, module)
    folder = save_subnet(result.extract(best), tmp_path / "folder")
    net = load_subnet(
        folder, lambda: ElasticMobileNetV3.tiny(n_classes=10, depths=(1, 2), widths=(8, 12))
    )
    assert subnet_record(net)["subnet"] == best.subnet.to_json()
    with pytest.raises(SearchError, match="does not have it") as error:
        load_subnet(tmp_path / "tuned.ckpt", LitNet)
    assert_clear(error)


class LitElastic(LitMlp):
    """Around a network that `elastic` made one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = elastic(  # type: ignore[assignment] # in place of the own one
            Net(), space=SearchSpace(blocks=[1, 2, 4]), activate=shallow
        )
        self.example_input_array = torch.randn(2, 64)


def shallow(net: Any, subnet: Any) -> None:
    for i, block in enumerate(net.blocks):
        block.forward = Block.forward.__get__(block) if i < subnet["blocks"] else skip


def skip(x: torch.Tensor, mask: Any = None) -> tuple[torch.Tensor, None]:
    return x, None


@pytest.mark.parametrize("make", [LitElastic, LitMlp])
def test_subnets_of_other_super_networks(make: Any, tmp_path: Path) -> None:
    model = make()
    result = search(budget=2).fit(model, Digits(), progress=False)
    module = result.to_module(model, model.net.search_space().smallest)
    tuned(module, tmp_path / "tuned.ckpt")
    options = {"example_input": torch.randn(2, 64)}
    assert same(load_subnet(tmp_path / "tuned.ckpt", make, **options), module)


def test_a_module_that_is_elastic_itself(tmp_path: Path) -> None:
    model = LitNet()
    elasticize(model, torch.randn(2, 64))
    result = search(budget=2).fit(model, Digits(), progress=False)
    module = result.to_module(model, model.search_space().smallest)
    tuned(module, tmp_path / "tuned.ckpt")
    again = load_subnet(tmp_path / "tuned.ckpt", LitNet)
    assert len(again.net.blocks) < 4
    assert same(again, module)


def test_a_subnet_of_a_subnet(tmp_path: Path) -> None:
    first = elasticize(Net(), torch.randn(2, 64), depth=False, widths=(0.5, 1))
    half = first.extract(first.search_space().smallest)
    second = elasticize(half, torch.randn(2, 64), widths=(0.5, 1))
    small = second.extract(second.search_space().smallest)
    again = load_subnet(save_subnet(small, tmp_path), Net)
    assert same(again, small)
