# SPDX-License-Identifier: Apache-2.0
"""A copy of a model whose super-network is one subnet: it trains as any module."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_subnet import SearchResult, SubnetSearch, elastic, export_onnx
from lightning_subnet.errors import SearchError
from lightning_subnet.export import export_torch, load_exported
from tests.export.networks import train
from tests.networks import Digits, ElasticMlp, LitMlp, quiet_trainer
from tests.problems import assert_clear
from tests.results.mobile import LitMobile, searched


@pytest.fixture(name="searched", scope="module")
def _searched() -> tuple[LitMobile, SearchResult]:
    return searched()


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


def test_the_winner_trains_as_any_module_and_is_exported(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    model, result = searched
    before = {key: value.clone() for key, value in model.state_dict().items()}
    best = result.best("val_acc")
    module = result.to_module(model, best)
    assert type(module) is LitMobile
    assert type(module.net).__name__ == "MobileNetV3"
    assert module._trainer is None
    assert all(p.requires_grad for p in module.parameters())
    assert all(child.training for child in module.modules())
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), result.extract(best)(x.reshape(-1, 1, 8, 8)))
    fell, trainer = train(module.train(), enable_checkpointing=False)
    assert fell > 0.1
    assert unchanged(model, before)
    assert "val_acc" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    again = result.to_module(model, best)
    again.load_state_dict(torch.load(tmp_path / "tuned.ckpt", weights_only=False)["state_dict"])
    exported = export_onnx(again.net, tmp_path / "tuned.onnx", x.reshape(-1, 1, 8, 8))
    with torch.no_grad():
        expected = module.eval()(x)
    torch.testing.assert_close(
        load_exported(exported.path)(x.reshape(-1, 1, 8, 8)), expected, rtol=1e-4, atol=1e-4
    )
    whole = export_torch(again, tmp_path / "whole.pt2", x)  # with its forward
    torch.testing.assert_close(load_exported(whole.path)(x), expected, rtol=1e-4, atol=1e-4)


class LitElastic(ElasticMlp, L.LightningModule):
    """A LightningModule that is the super-network itself, and activates others in training."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.activate(self.search_space().sample(1, index)[0])
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    configure_optimizers = LitMlp.configure_optimizers


def attached() -> L.LightningModule:
    """A LightningModule that knows nothing of subnets, made searchable from outside."""
    return elastic(
        LitMlp(), space=ElasticMlp().search_space(),
        activate=lambda m, s: (setattr(m.net, "width", s["width"]), setattr(m.net, "sharpen", 1)),
    )  # fmt: skip


class Deciding(ElasticMlp):
    """Decides by its input, so it cannot be sliced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


def deciding() -> LitMlp:
    model = LitMlp()
    model.net = Deciding()
    return model


@pytest.mark.parametrize("make", [deciding, LitElastic, attached])
def test_a_super_network_that_cannot_be_sliced_keeps_the_subnet_for_good(
    make: Callable[[], L.LightningModule],
) -> None:
    torch.manual_seed(0)
    model = make()
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=3, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    subnet = result.history.space.subnet(width=8, sharpen=1)
    module = result.to_module(model, subnet)
    assert type(module) is type(model)
    assert module is not model
    net: Any = module.net if hasattr(module, "net") else module
    assert net.width == 8
    fell, trainer = train(module)
    assert fell > 0.1
    assert net.width == 8
    assert unchanged(model, before)
    assert trainer.callback_metrics["val_acc"] > 0.1
    rest = net.first.weight[8:].detach(), before[next(k for k in before if "first.weight" in k)][8:]
    assert torch.equal(*rest), "what is not of the subnet did not learn"


def test_a_network_without_an_extract_is_sliced_and_learns() -> None:
    torch.manual_seed(0)
    model = LitMlp()
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=2, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = result.to_module(model, result.history.space.subnet(width=8, sharpen=1))
    assert type(module) is LitMlp
    assert {name: tuple(p.shape) for name, p in module.net.named_parameters()} == {
        "norm.weight": (64,), "norm.bias": (64,), "first.weight": (8, 64), "first.bias": (8,),
        "last.weight": (10, 8), "last.bias": (10,),
    }  # fmt: skip
    fell, trainer = train(module)
    assert fell > 0.1
    assert trainer.callback_metrics["val_acc"] > 0.1
    assert unchanged(model, before)


def test_a_model_with_a_trainer_is_copied_without_it() -> None:
    model = LitMlp()
    _, trainer = train(model)
    assert model._trainer is trainer
    result = SubnetSearch(
        objectives={"val_acc": "max"}, strategy="random", budget=2, storage=None,
        trainer=quiet_trainer(),
    ).fit(model, Digits(), progress=False)  # fmt: skip
    module = result.to_module(model, result.best("val_acc"))
    assert module._trainer is None
    assert model._trainer is trainer


def test_a_loaded_result_replaces_in_a_model_that_is_given(
    searched: tuple[LitMobile, SearchResult], tmp_path: Path
) -> None:
    model, result = searched
    result.save(tmp_path / "result.json")
    loaded = SearchResult.load(tmp_path / "result.json")
    module = loaded.to_module(model, loaded.best("val_acc"))
    assert type(module.net).__name__ == "MobileNetV3"


def test_frozen_layers_stay_frozen(searched: tuple[LitMobile, SearchResult]) -> None:
    _, result = searched
    model = LitMobile()
    model.net.stem.requires_grad_(False)
    model.net.stem.eval()
    module = result.to_module(model, result.best("val_acc"))
    assert not any(p.requires_grad for p in module.net.stem.parameters())
    assert all(p.requires_grad for p in module.net.stages.parameters())
    assert not module.net.stem.training
    assert module.net.stages.training


def test_models_in_which_nothing_can_be_replaced(
    searched: tuple[LitMobile, SearchResult],
) -> None:
    _, result = searched
    best = result.best("val_acc")

    class Itself(LitMobile):
        """The super-network by its own methods, which extracts a bare network."""

        def search_space(self) -> Any:
            return self.net.search_space()

        def activate(self, subnet: Any) -> None:
            self.net.activate(subnet)

        def extract(self, subnet: Any) -> nn.Module:
            return self.net.extract(subnet)

    model = Itself()
    with pytest.raises(SearchError) as caught:
        result.to_module(model, best)
    assert_clear(
        caught.value, "Itself is the super-network itself", "Move the network into a child"
    )
    with pytest.raises(SearchError, match="not a module"):
        result.to_module("model.ckpt", best)
    with pytest.raises(SearchError, match="no elastic part"):
        result.to_module(LitMobile(nn.Linear(64, 10)), best)
    holding = LitMobile()
    holding.last = holding(torch.randn(1, 64))  # a tensor of a graph, which torch does not copy
    copied: Any = result.to_module(holding, best)
    assert torch.equal(copied.last, holding.last.detach())
    holding.last = threading.Lock()
    with pytest.raises(SearchError) as caught:
        result.to_module(holding, best)
    assert_clear(caught.value, "LitMobile cannot be copied", "lock", "no locks or open files")
