# SPDX-License-Identifier: Apache-2.0
"""Ways to score: all of them give the number of what ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_subnet import Latency, SubnetSearch, elastic, recalibrate
from lightning_subnet.errors import MeasurementError, ParityError, SearchError
from lightning_subnet.supernets import ElasticMobileNetV3
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from lightning_subnet.training.validation.scoring import Converted
from tests.networks import LitMlp, digits, quiet_trainer, search


class LitNet(L.LightningModule):
    """A small MobileNetV3 on the digits; `net` may be another one."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def validation_step(self, batch: Any, _: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))


class Images(L.LightningDataModule):
    def setup(self, stage: str) -> None:
        x, y = digits().tensors
        data = TensorDataset(x.view(-1, 1, 8, 8), y)
        self.train = torch.utils.data.Subset(data, range(256))
        self.val = torch.utils.data.Subset(data, range(256, 430))  # a smaller last batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 50)


@pytest.fixture
def lit() -> LitNet:
    L.seed_everything(0, verbose=False)
    return LitNet()


def scores(model: L.LightningModule, score: Any, subnets: Any = None) -> list[Any]:
    source = Source(Images(), calibration_images=128)
    trainer = quiet_trainer()
    with TrainerEvaluator(model, source, trainer=trainer, score=score) as evaluator:
        subnets = subnets or evaluator.space.sample(3, rng=1)
        return [dict(evaluator.evaluate(subnet)) for subnet in subnets]


RUNTIMES = [
    "extracted",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("onnxruntime", "openvino")),
]


@pytest.mark.parametrize("score", RUNTIMES)
def test_all_ways_give_the_same_numbers(lit: LitNet, score: str) -> None:
    part, state = lit.net, {k: v.clone() for k, v in lit.state_dict().items()}
    for one, other in zip(scores(lit, "network"), scores(lit, score), strict=True):
        assert other["val_acc"] == pytest.approx(one["val_acc"], abs=1e-6)
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert lit.net is part
    assert all(torch.equal(v, state[k]) for k, v in lit.state_dict().items())


def fit(model: L.LightningModule, **settings: Any) -> Any:
    default = {"objectives": {"val_acc": "max", "macs": "min"}, "budget": 4, "storage": None}
    default |= {"strategy": "random", "trainer": quiet_trainer(), "calibration_images": 128}
    return SubnetSearch(**{**default, **settings}).fit(model, Images(), progress=False)


def test_what_was_scored_extracted_is_what_extract_gives(lit: LitNet) -> None:
    result = fit(lit, score="extracted")
    data = Images()
    data.setup("fit")
    for evaluation in result.history:
        net = result.extract(evaluation)
        with torch.no_grad():
            right = [net(x).argmax(1) == y for x, y in data.val_dataloader()]
        assert torch.cat(right).float().mean().item() == pytest.approx(
            evaluation.values["val_acc"], abs=1e-6
        )
        assert net.parity < 1e-4
    assert result.verify(lit, Images(), trainer=quiet_trainer())["val_acc_drop"].abs().max() < 1e-6


def test_ways_to_score_are_other_values(lit: LitNet, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    fit(lit, storage=storage, name="in place")
    apart = fit(lit, storage=storage, name="apart", score="extracted")
    again = fit(lit, storage=storage, name="again", score="extracted")
    assert not any(e.reused for e in apart.history)
    assert all(e.reused for e in again.history)


# A network that runs in training mode alone


class TrainingNorm(nn.Module):
    """BatchNorm of a super-network in the style of AttentiveNAS: there are no statistics of it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(n, momentum=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise ValueError("only supports training")
        c = x.size(1)
        bn = self.bn
        return F.batch_norm(x, None, None, bn.weight[:c], bn.bias[:c], training=True)


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 8, 3), TrainingNorm(8), nn.Linear(8, 10)
        self.width = 8

    def set_active_subnet(self, width: int) -> None:
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = self.norm(F.conv2d(x, self.conv.weight[:w], self.conv.bias[:w])).relu().mean((2, 3))
        return F.linear(x, self.last.weight[:, :w], self.last.bias)

    def get_active_subnet(self) -> nn.Module:
        w = self.width
        net = nn.Sequential(
            nn.Conv2d(1, w, 3), nn.BatchNorm2d(w), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(w, 10),
        )  # fmt: skip
        with torch.no_grad():
            net[0].weight.copy_(self.conv.weight[:w])
            net[0].bias.copy_(self.conv.bias[:w])
            net[1].weight.copy_(self.norm.bn.weight[:w])
            net[1].bias.copy_(self.norm.bn.bias[:w])
            net[5].weight.copy_(self.last.weight[:, :w])
            net[5].bias.copy_(self.last.bias)
        return net


def dynamic(*, right: bool = True) -> LitNet:
    from lightning_subnet import SearchSpace

    def extract(net: Any, subnet: Any) -> nn.Module:
        before = net.width
        net.set_active_subnet(subnet["width"] if right else 8)
        plain = net.get_active_subnet()
        net.set_active_subnet(before)
        return plain

    L.seed_everything(0, verbose=False)
    net = elastic(
        Dynamic(),
        space=SearchSpace(width=[2, 4, 8]),
        activate=lambda net, subnet: net.set_active_subnet(**subnet),
        extract=extract,
    )
    return LitNet(net)


def test_a_network_that_cannot_run_in_eval_mode_is_scored_as_what_ships(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = dynamic()
    run = SubnetSearch(
        objectives={"val_acc": "max", "params": "min"}, budget=3, storage=None, strategy="random",
        trainer=quiet_trainer(), calibration_images=256, name="training alone",
    )  # fmt: skip
    result = run.fit(model, Images())
    out = capsys.readouterr().out
    assert out.count("score='extracted'") == 1
    assert result.history.ok.all()
    assert model.net.training
    data = Images()
    data.setup("fit")
    for e in result.history:
        model.net.set_active_subnet(**e.subnet)
        plain = model.net.get_active_subnet()
        recalibrate(plain, [x for x, _ in data.train_dataloader()])
        plain.eval()
        with torch.no_grad():
            right = torch.cat([plain(x).argmax(1) == y for x, y in data.val_dataloader()])
        assert e.values["val_acc"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_its_extraction_is_compared_in_training_mode() -> None:
    with pytest.raises(ParityError, match=r"width=2\) is another network"):
        fit(dynamic(right=False))


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "extract"}, "Did you mean 'extracted'"),
        ({"score": None}, "score=None is unknown"),
        ({"score": "onnxruntime", "measures": [Latency()]}, r"Latency\(runtime='onnxruntime'\)"),
        (
            {"score": "openvino", "objectives": {"val_acc": "max", "latency_ms": "min"}},
            r"measures=\[Latency\(runtime='openvino'\)\]",
        ),
        ({"checks": "all"}, r"checks='all' is not True, False or Checks"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        search(**settings)


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(SearchError, match=r"score='openvino'.*lightning-subnet\[openvino\]"):
        search(score="openvino")


def test_a_network_of_which_nothing_can_be_extracted(model: LitMlp) -> None:
    class Deciding(type(model.net)):  # type: ignore[misc] # by the class of a fixture
        """Decides by its input, which cannot be exported."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model.net.__class__ = Deciding
    with pytest.raises(SearchError, match=r"cannot be cut apart.*score='network'"):
        search(score="extracted").fit(model, Images_of_digits(), progress=False)


def Images_of_digits() -> L.LightningDataModule:  # noqa: N802 - reads as the class it stands for
    from tests.networks import Digits

    return Digits()


def test_a_step_that_goes_past_forward_cannot_be_scored_extracted() -> None:
    class Around(LitNet):
        """Looks at a few of the batches alone, and at the first through forward()."""

        def validation_step(self, batch: Any, i: int) -> None:
            if self.trainer.validate_loop.restarting or not self.trainer.evaluating:
                self(batch[0])
            self.log("val_acc", batch[0].mean())

    model = Around()
    with pytest.raises(MeasurementError, match=r"does not call .*forward\(\)"):
        fit(model, score="extracted", calibration_images=0)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: Any = None


class Texts(nn.Module):
    """A network in the style of transformers: named arguments, and an output object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(64, 16), nn.Linear(16, 10), 16

    def forward(self, *, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> Output:
        w = self.width
        x = F.linear(pixels, self.first.weight[:w], self.first.bias[:w]).relu()
        x = x if mask is None else x * mask[:, None]
        return Output(F.linear(x, self.last.weight[:, :w], self.last.bias), (x,))


class LitTexts(LitNet):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)

    def forward(self, batch: Any) -> Any:
        return self.net(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def validation_step(self, batch: Any, _: int) -> None:
        logits = self(batch)
        self.log("val_acc", (logits.argmax(1) == batch["labels"]).float().mean())


def texts(*, right: bool) -> tuple[LitTexts, Any]:
    from lightning_subnet import SearchSpace

    class Cut(Texts):
        pass

    def extract(net: Texts, subnet: Any) -> nn.Module:
        plain, w = Cut(), subnet["width"]
        plain.load_state_dict(net.state_dict())
        plain.width = w if right else 16
        return plain

    L.seed_everything(0, verbose=False)
    net = elastic(
        Texts(), space=SearchSpace(width=[4, 8, 16]),
        activate=lambda net, subnet: setattr(net, "width", subnet["width"]), extract=extract,
    )  # fmt: skip
    x, y = digits().tensors
    rows = [{"pixels": a, "mask": torch.ones(()), "labels": b} for a, b in zip(x, y, strict=True)]
    return LitTexts(net), DataLoader(rows[:200], 64)


def test_dicts_in_and_objects_out_are_compared_too() -> None:
    run = search(objectives={"val_acc": "max"}, budget=3, calibration_images=0)
    model, data = texts(right=True)
    result = run.fit(model, dataloaders=data, progress=False)
    net = result.extract(result.history[0])
    assert net.parity == 0
    assert set(result.example_input()) == {"pixels", "mask"}
    model, data = texts(right=False)
    with pytest.raises(ParityError, match="is another network"):
        run.replace(name="wrong").fit(model, dataloaders=data, progress=False)
    unchecked = run.replace(name="unchecked", checks=False)
    result = unchecked.fit(model, dataloaders=data, progress=False)
    assert result.extract(result.history.space.smallest).parity > 0.01  # it is told


# Networks that keep slices of their weights


class Kept(nn.Module):
    """In the style of HAT and AutoFormer: activation keeps the slices that forward() takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)
        self.set_sample_config({"width": 16})

    def set_sample_config(self, config: Any) -> None:
        w = config["width"]
        self.samples = {"first": self.first.weight[:w], "bias": self.first.bias[:w]}
        self.samples["last"] = self.last.weight[:, :w]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x.flatten(1), self.samples["first"], self.samples["bias"]).relu()
        return F.linear(x, self.samples["last"], self.last.bias)


@pytest.mark.parametrize("score", ["network", "extracted"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_kept_slices_are_those_of_the_weights_that_validate(precision: Any, score: Any) -> None:
    from lightning_subnet import SearchSpace

    L.seed_everything(0, verbose=False)
    net = elastic(
        Kept(), space=SearchSpace(width=[4, 8, 16]),
        activate=lambda net, subnet: net.set_sample_config(subnet),
    )  # fmt: skip
    model = LitNet(net)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = quiet_trainer(precision=precision)
    objectives = {"val_loss": "min"}
    result = fit(model, trainer=trainer, objectives=objectives, score=score, budget=3)
    assert result.history.ok.all()
    assert len({e.values["val_loss"] for e in result.history}) >= 2  # bfloat16 rounds
    data = Images()
    data.setup("fit")
    for e in result.history:  # by hand, in single precision
        net.set_sample_config(e.subnet)
        with torch.no_grad():
            losses = [(F.cross_entropy(net(x), y), len(y)) for x, y in data.val_dataloader()]
        loss = sum(a.item() * n for a, n in losses) / sum(n for _, n in losses)
        rel = 0.02 if precision == "bf16-true" else 1e-5
        assert e.values["val_loss"] == pytest.approx(loss, rel=rel)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.extract(result.history[0]).first.weight.shape == (16, 64)


def test_a_file_gets_inputs_of_another_size_than_it_was_made_for() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    file = Converted(net, ((torch.randn(4, 2, 6),), {}), "onnxruntime")
    assert file(torch.randn(1, 2, 6)).shape == (1, 3)
    with pytest.raises(RuntimeError, match=r"takes .* \(batch, 2, 6\), .* got \(4, 2, 9\): val"):
        file(torch.randn(4, 2, 9))
