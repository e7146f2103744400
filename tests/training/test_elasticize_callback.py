# SPDX-License-Identifier: Apache-2.0
"""An ordinary LightningModule becomes elastic in the Trainer, in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_subnet import (
    Elasticize,
    Latency,
    SubnetSampling,
    SubnetSearchCallback,
    SubnetValidation,
    elasticize,
    export_onnx,
)
from lightning_subnet.costs import PeakMemory
from lightning_subnet.errors import ElasticityError, ElasticityWarning, SearchError
from lightning_subnet.export import load_exported
from lightning_subnet.training.validation.batch_input import inputs_in
from tests.networks import LitMlp, digits, quiet_trainer, search
from tests.problems import assert_clear

ROOT = Path(__file__).resolve().parents[2]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


class Plain(L.LightningModule):
    """An ordinary LightningModule; `forward` and the step call its one network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen.append(getattr(self.net, "active_subnet", None))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Functional(Plain):
    """No `forward`: the step calls the network."""

    forward = L.LightningModule.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Dicts(Plain):
    """Batches are dicts, of which the network takes some entries by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Named()

    def forward(self, **batch: Any) -> Any:
        return self.net(pixels=batch["pixels"], scale=batch["scale"])

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        logits = self.net(pixels=batch["pixels"], scale=batch["scale"])["logits"]
        return F.cross_entropy(logits, batch["labels"])

    def validation_step(self, batch: Any, _: int) -> None:
        logits = self(**batch)["logits"]
        self.log("val_loss", F.cross_entropy(logits, batch["labels"]))
        self.log("val_acc", (logits.argmax(1) == batch["labels"]).float().mean())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, pixels: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        return {"logits": self.body(pixels if scale is None else pixels * scale), "loss": None}


def named(rows: list[Any]) -> dict[str, torch.Tensor]:
    x, y = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"pixels": x, "scale": torch.ones(len(x), 1), "labels": y}


def loader(n: int = 96, **options: Any) -> DataLoader:
    return DataLoader(torch.utils.data.Subset(digits(), range(n)), batch_size=32, **options)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("first", [True, False])
def test_one_trainer_makes_elastic_trains_and_searches(first: bool) -> None:
    model = Plain()
    rest: list[Any] = [SubnetSampling(), SubnetSearchCallback(search(), progress=False)]
    elastic = Elasticize(widths=(0.5, 1))
    callbacks = [elastic, *rest] if first else [*rest, elastic]
    trainer = quiet_trainer(max_steps=2, callbacks=callbacks)
    trainer.fit(model, loader(), loader())
    space = model.net.search_space()
    assert space.values == {"width.0": (16, 32), "width.3": (8, 16)}
    assert {space.largest, space.smallest} <= {*model.seen}
    result = rest[1].result
    assert len(result.history) == space.size
    small = result.extract(space.smallest)
    assert [type(m).__name__ for m in small] == [type(m).__name__ for m in network()]
    assert small[0].weight.shape == (16, 64)
    assert elastic.report is not None
    assert len(elastic.report.elastic) == 2


@pytest.mark.parametrize("make", [Plain, Functional, Dicts])
def test_the_input_comes_from_the_first_batch(make: type[Plain]) -> None:
    model = make()
    data = loader(collate_fn=named) if make is Dicts else loader()
    quiet_trainer(max_steps=1, callbacks=[Elasticize()]).fit(model, data)
    assert [*model.net.search_space().values] == (
        ["width.body.0", "width.body.3"] if make is Dicts else ["width.0", "width.3"]
    )


def test_dict_batches_are_sampled_validated_counted_timed_and_exported(tmp_path: Path) -> None:
    model = Dicts()
    data = loader(collate_fn=named)
    callbacks = [Elasticize(widths=(0.5, 1)), SubnetSampling(distill="net")]
    quiet_trainer(max_steps=1, callbacks=callbacks).fit(model, data)
    quick = Latency(repeats=15, seconds=0.01)
    result = search(
        objectives={"val_loss": "min", "macs": "min", "latency_ms": "min"},
        measures=[quick, PeakMemory()],
        budget=4,
    ).fit(model, train_dataloaders=data, dataloaders=data, progress=False)
    assert result.history.ok.all()
    best = result.best("val_loss")
    macs = 64 * 16 + 16 * 8 + 8 * 10  # weights of the smallest
    assert result.history.get(model.net.search_space().smallest).values["macs"] == macs
    plain = result.extract(best)
    exported = export_onnx(plain, tmp_path / "net.onnx", result.example_input())
    batch = named([digits()[i] for i in range(3)])
    with torch.no_grad():
        expected = plain(pixels=batch["pixels"], scale=batch["scale"])["logits"]
    loaded = load_exported(exported.path)
    output = loaded(pixels=batch["pixels"], scale=batch["scale"])
    torch.testing.assert_close(output if torch.is_tensor(output) else output["logits"], expected)


@pytest.mark.parametrize(
    ("batch", "forward", "expected"),
    [
        ({"image": 1, "label": 2}, lambda image: 0, [{"image": 1}]),
        ({"x": 1, "labels": 2}, lambda x, labels: 0, [{"x": 1, "labels": 2}]),
        ({"x": 1, "labels": 2}, lambda x, labels=None: 0, [{"x": 1}, {"x": 1, "labels": 2}]),
        ({"x": 1, "y": 2}, lambda **batch: 0, [{"x": 1}, {"x": 1, "y": 2}]),
        ({"x": 1, "y": 2}, lambda batch: 0, [{"batch": {"x": 1, "y": 2}}]),
        ([{"x": 1}, 2], lambda x: 0, [{"x": 1}]),
        ({"a": 1, "b": 2}, lambda x: 0, []),
        ("words", lambda x: 0, []),
    ],
)
def test_what_a_network_takes_of_a_dict(batch: Any, forward: Any, expected: list[Any]) -> None:
    class Net:
        pass

    net = Net()
    net.forward = forward  # type: ignore[attr-defined] # as a module has it
    assert [kwargs for _, kwargs in inputs_in(batch, net)] == expected


def test_data_is_drawn_as_without_it() -> None:
    trained = []
    for callbacks in ([], [Elasticize(importance=None)]):
        model = Plain()
        L.seed_everything(1, verbose=False)
        quiet_trainer(max_steps=3, callbacks=callbacks).fit(model, loader(shuffle=True))
        trained.append(weights(model))
    for key, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][key])


@pytest.mark.parametrize("importance", ["l1", "taylor", "activation"])
def test_units_are_sorted_once(importance: Any) -> None:
    model = Plain()
    before, x = weights(model), torch.randn(8, 64)
    expected = model.eval()(x)
    callback = Elasticize(importance=importance)
    trainer = quiet_trainer(max_steps=0, callbacks=[callback])
    trainer.fit(model, loader())
    sorted_weights = weights(model)
    assert not torch.equal(before["net.0.weight"], sorted_weights["net.0.weight"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    assert all(p.grad is None for p in model.parameters())
    trainer.fit(model, loader())
    for key, value in weights(model).items():
        assert torch.equal(value, sorted_weights[key])


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [Elasticize(widths=(0.5, 1)), SubnetSampling()]

    whole = Plain()
    quiet_trainer(max_epochs=2, callbacks=callbacks()).fit(whole, loader())
    half = Plain()
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks())
    trainer.fit(half, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = Plain()
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks())
    trainer.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for key, value in weights(whole).items():
        torch.testing.assert_close(again.state_dict()[key], value)

    other = quiet_trainer(max_epochs=2, callbacks=[Elasticize(widths=(0.25, 1))])
    with pytest.raises(SearchError, match=r"width\.0: \[16, 32\] there, \[8, 32\] here") as error:
        other.fit(Plain(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_clear(error)


def test_a_checkpoint_of_another_training_is_refused_or_sorted(tmp_path: Path) -> None:
    plain = Plain()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(plain, loader())
    path = tmp_path / "plain.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(SearchError, match="without Elasticize") as error:
        quiet_trainer(max_steps=2, callbacks=[Elasticize()]).fit(
            Plain(), loader(), ckpt_path=path, weights_only=False
        )
    assert_clear(error)
    model = Plain()
    (row,) = quiet_trainer(callbacks=[Elasticize()]).validate(
        model, loader(), ckpt_path=path, weights_only=False, verbose=False
    )
    (expected,) = quiet_trainer().validate(plain, loader(), verbose=False)
    assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    norms = model.net[3].weight.abs().sum(0)  # the readers of the first group
    assert torch.equal(norms, norms.sort(descending=True).values)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_make_it_elastic_too(stage: str) -> None:
    class All(Plain):
        def test_step(self, batch: Any, index: int) -> None:
            self.validation_step(batch, index)

        def predict_step(self, batch: Any) -> torch.Tensor:
            return self(batch[0])

    model = All()
    getattr(quiet_trainer(callbacks=[Elasticize()]), stage)(model, loader())
    assert model.net.search_space().size == 8


def test_with_subnet_validation() -> None:
    model = Plain()
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[SubnetValidation(), Elasticize(widths=(0.5, 1))]
    )
    trainer.fit(model, loader(), loader())
    assert any("smallest" in name for name in trainer.callback_metrics)


class Elsewhere(Plain):
    """The step runs another network than `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self.other(batch[0]), batch[1])


class Partly(Plain):
    """The step leaves out some of what `forward` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.side(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("sampling", [True, False])
def test_a_step_that_does_not_run_the_network_is_told(sampling: bool) -> None:
    def fit(model: Plain, **options: Any) -> None:
        callbacks = [Elasticize(**options), *([SubnetSampling()] if sampling else [])]
        quiet_trainer(max_steps=1, callbacks=callbacks).fit(model, loader())

    with pytest.raises(SearchError, match="does not run what is elastic") as error:
        fit(Elsewhere(), module="net")
    assert_clear(error)
    fit(Elsewhere(), module="other")
    with pytest.warns(ElasticityWarning, match=r"'width\.side\.0' got no gradients"):
        fit(Partly())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ElasticityWarning)
        fit(Plain())


class Configured(Plain):
    """Builds its network in configure_model, as large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


def test_networks_of_configure_model() -> None:
    model = Configured()
    quiet_trainer(max_steps=1, callbacks=[Elasticize()]).fit(model, loader())
    assert model.net.search_space().size == 8


class Late(Plain):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        self.net = network()


def test_what_cannot_be_made_elastic_is_said() -> None:
    def fails(model: L.LightningModule, match: str, *callbacks: Any) -> None:
        trainer = quiet_trainer(max_steps=1, callbacks=[*(callbacks or [Elasticize()])])
        with pytest.raises((SearchError, ElasticityError), match=match) as error:
            trainer.fit(model, loader())
        assert_clear(error)

    fails(Late(), "no weights yet")
    fails(LitMlp(), "elastic by itself")
    fails(Plain(), "Did you mean 'net'", Elasticize(module="ne"))
    fails(Plain(), "does not take it|is not run by it", Elasticize(example_input=torch.ones(2, 3)))
    model = Plain()
    quiet_trainer(max_steps=1, callbacks=[Elasticize()]).fit(model, loader())
    fails(model, "elastic already, with other arguments", Elasticize(widths=(0.5, 1)))
    own = Plain()
    elasticize(own.net, torch.randn(2, 64), widths=(0.5, 1))
    quiet_trainer(max_steps=1, callbacks=[Elasticize()]).fit(own, loader())
    assert own.net.search_space().size == 4


def test_patterns_may_begin_with_the_name_of_the_network() -> None:
    model = Plain()
    quiet_trainer(max_steps=1, callbacks=[Elasticize(groups=["net.0"])]).fit(model, loader())
    assert [*model.net.search_space().values] == ["width.0"]


def test_two_processes_make_the_same_network_elastic(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.programs.ddp_elasticize_program", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["hash"] == other["hash"]
    assert one["values"] == {"width.0": (16, 32), "width.3": (8, 16)}
    for key, value in one["weights"].items():
        assert torch.equal(value, other["weights"][key])
