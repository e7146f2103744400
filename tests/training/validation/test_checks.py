# SPDX-License-Identifier: Apache-2.0
"""Checks of a search: a number is true, or there is one clear error."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_subnet import SearchSpace, elastic
from lightning_subnet.errors import (
    CalibrationWarning,
    ElasticityError,
    ElasticityWarning,
    MeasurementError,
    ParityError,
    ParityWarning,
    SearchError,
)
from lightning_subnet.training import Checks
from lightning_subnet.training.validation.checks import checked_score
from lightning_subnet.training.validation.evaluator import TrainerEvaluator
from lightning_subnet.training.validation.frozen_data import Source
from lightning_subnet.training.validation.guards import WeightGuard, differing, warn_of_renewal
from tests.networks import Digits, ElasticMlp, LitMlp, digits, quiet_trainer, search


def scores(model: L.LightningModule, order: Any = None, **options: Any) -> dict[str, Any]:
    """Return the metrics of all subnets, scored in an order, by subnet."""
    options = {"checks": False, **options}
    with TrainerEvaluator(model, Source(Digits()), trainer=quiet_trainer(), **options) as evaluator:
        subnets = list(evaluator.space)
        return {s.key: dict(evaluator.evaluate(s)) for s in (order or list)(subnets)}


# State that a validation leaves


class NeverReset(LitMlp):
    """Gathers right answers in all the ways in which people do, and empties none."""

    def __init__(self) -> None:
        super().__init__()
        self.right: list[torch.Tensor] = []
        self.total, self.n = 0.0, 0
        self.metric = MulticlassAccuracy(num_classes=10, average="micro")
        self.hidden_metric = {"acc": MulticlassAccuracy(num_classes=10, average="micro")}

    def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        right = logits.argmax(1) == batch[1]
        self.right.append(right)
        self.total, self.n = self.total + right.sum().item(), self.n + len(right)
        for metric in (self.metric, self.hidden_metric["acc"]):
            metric.update(logits, batch[1])
        self.log("true_acc", right.float().mean(), batch_size=len(right))

    def on_validation_epoch_end(self) -> None:
        self.log("list_acc", torch.cat(self.right).float().mean())
        self.log("number_acc", self.total / self.n)
        self.log("metric_acc", self.metric.compute())
        self.log("hidden_acc", self.hidden_metric["acc"].compute())


@pytest.mark.parametrize("checks", [True, False])
def test_what_is_never_emptied_does_not_mix_subnets(checks: bool) -> None:
    model = NeverReset()
    model.metric.update(torch.eye(10), torch.arange(10))  # left over by a loop before
    model.right.append(torch.ones(3, dtype=torch.bool))
    before = scores(model, checks=checks)
    assert len({e["true_acc"] for e in before.values()}) > 5
    for metrics in before.values():
        assert metrics["metric_acc"] == pytest.approx(metrics["true_acc"], abs=1e-6)
        assert metrics["hidden_acc"] == pytest.approx(metrics["true_acc"], abs=1e-6)
        assert metrics["number_acc"] == pytest.approx(metrics["true_acc"], abs=1e-6)
    assert scores(model, lambda subnets: subnets[::-1], checks=checks) == before
    assert len(model.right) == 1  # as it was
    assert model.metric.compute() == 1 or model.metric.update_count == 0


def test_state_that_nobody_can_empty_is_an_error_that_names_what_it_can() -> None:
    everything: list[torch.Tensor] = []

    class Global(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            everything.append(self(batch[0]).argmax(1) == batch[1])
            self.batches = i

        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", torch.cat(everything).float().mean())

    run = search(objectives={"val_acc": "max"})
    with pytest.raises(MeasurementError, match=r"'val_acc' of one subnet is .* at first, and") as e:
        run.fit(Global(), Digits(), progress=False)
    assert "'batches'" in str(e.value)
    assert "Checks(repeat=False)" in str(e.value)
    unchecked = run.replace(checks=Checks(repeat=False, calibration=False))
    assert len(unchecked.fit(Global(), Digits(), progress=False).history) == 6


def test_validation_that_draws_is_an_error() -> None:
    generator = torch.Generator().manual_seed(0)

    class Drawing(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            noise = torch.randn(batch[0].shape, generator=generator)
            super().validation_step((batch[0] + noise, batch[1]), i)

    with pytest.raises(MeasurementError, match="drawn at random"):
        search(calibration_images=0).fit(Drawing(), Digits(), progress=False)


def test_only_what_the_search_looks_at_must_repeat() -> None:
    class Timed(LitMlp):
        calls = 0

        def on_validation_epoch_end(self) -> None:
            type(self).calls += 1
            self.log("time", float(self.calls))

    assert search().fit(Timed(), Digits(), progress=False).history.ok.all()


@pytest.mark.parametrize(
    "harm",
    [
        lambda net: net.first.weight.mul_(1.01),
        lambda net: net.first.weight.data.mul_(1.01),
        lambda net: net.last.bias.data.fill_(float("nan")),
        lambda net: setattr(net.first.weight, "data", net.first.weight.data * 1.01),
    ],
)
def test_a_validation_that_changes_weights_ends_the_search_and_they_come_back(harm: Any) -> None:
    class Training(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, i)
            with torch.no_grad():
                harm(self.net)

    model = Training()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MeasurementError, match=r"Validation changes weights of Training: 'net\."):
        search().fit(model, Digits(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Averaged(LitMlp):
    """Is validated with averages of its weights, as many a recipe has it."""

    when = "start"

    def swap(self, when: str) -> None:
        if when == self.when:
            for parameter in self.net.first.parameters():
                parameter.data = -parameter.data

    def on_validation_start(self) -> None:
        self.swap("start")

    def on_validation_end(self) -> None:
        self.swap("start")

    def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
        self.swap("step")
        super().validation_step(batch, i)
        self.swap("step")


@pytest.mark.parametrize("when", ["start", "step"])
def test_other_weights_in_a_validation_than_those_that_ship_are_an_error(when: str) -> None:
    model = Averaged()
    model.when = when
    weights = model.net.first.weight.clone()
    with pytest.raises(MeasurementError, match=r"other weights .*'net\.first\.weight'"):
        search().fit(model, Digits(), progress=False)
    assert torch.equal(model.net.first.weight, weights)
    model.when = "never"
    for score in ("extracted", "onnxruntime"):
        assert len(search(score=score, budget=2).fit(model, Digits(), progress=False).history) == 2


def test_a_network_that_draws_in_eval_mode_is_told() -> None:
    class Drawing(ElasticMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.5)  # also in eval mode

    model = LitMlp()
    model.net = Drawing()
    with pytest.warns(ParityWarning, match="Drawing draws random numbers in eval mode"):
        search(calibration_images=0, budget=1).fit(model, Digits(), progress=False)


def test_a_network_that_draws_is_scored_with_the_same_draws_however_often_its_layers_are_probed(
    recwarn: pytest.WarningsRecorder,
) -> None:
    class Own(ElasticMlp):
        """Has a running average of its own, which is learnt of in further passes."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()
            self.register_buffer("running_mean", torch.zeros(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(x, 0.2)  # also in eval mode
            if self.training:
                self.running_mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
            return super().forward(x - self.running_mean)

    model = with_net(Own())
    first, again = scores(model, checks=True), scores(model, lambda subnets: subnets[::-1])
    assert first == again
    assert len({e["val_loss"] for e in first.values()}) == 12


def test_every_change_of_a_weight_is_seen() -> None:
    module = nn.ModuleDict(
        {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3).half(), "c": nn.Linear(2, 2).double()}
    )
    module.register_parameter("complex", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    module.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    module.register_parameter("bytes", nn.Parameter(torch.ones(3, dtype=torch.int8), False))
    guard = WeightGuard(module)
    for name, p in module.named_parameters():
        if p.numel():
            with torch.no_grad():
                p.flatten()[0].mul_(2) if p.ndim else p.mul_(2)
            assert guard.changed() == [name]
            guard.restore()
        assert guard.changed() == []
    with torch.no_grad():  # one step of rounding
        w = module["a"].weight
        w[0, 0] = torch.nextafter(w[0, 0], torch.tensor(10.0))
    assert guard.changed() == ["a.weight"]


# Parity


class Wrong(ElasticMlp):
    """Its extract() gives the largest, whatever it gets."""

    def extract(self, subnet: Any) -> nn.Module:
        net = ElasticMlp()
        net.load_state_dict(self.state_dict())
        return net


def with_net(net: nn.Module) -> LitMlp:
    model = LitMlp()
    model.net = net
    return model


def test_an_extract_that_gives_another_subnet_is_refused_before_anything_is_spent() -> None:
    model = with_net(Wrong())
    run = search()
    with pytest.raises(ParityError, match=r"is another network than the super-network Wrong .*ex"):
        run.fit(model, Digits(), progress=False)
    assert model.validated.n == 0
    result = run.replace(checks=Checks(parity=False)).fit(model, Digits(), progress=False)
    assert result.extract(result.history.space.smallest).parity > 0.01  # told, where asked for


@pytest.mark.parametrize("returns", [None, "net", {"a": 1}])
def test_an_extract_that_gives_no_network_is_refused(returns: Any) -> None:
    class Nothing(ElasticMlp):
        def extract(self, subnet: Any) -> Any:
            return returns

    with pytest.raises(ElasticityError, match=r"Nothing\.extract\(\) returned .* an nn\.Module"):
        search(objectives={"val_acc": "max"}).fit(with_net(Nothing()), Digits(), progress=False)


def test_extraction_and_modules_for_training_are_compared_too() -> None:
    net = ElasticMlp()
    model = with_net(net)
    result = search().fit(model, Digits(), progress=False)
    smallest = result.history.space.smallest
    assert result.extract(smallest).parity < 1e-5
    net.extract = partial(Wrong.extract, net)  # type: ignore[operator] # for this object
    with pytest.raises(ParityError, match="is another network"):
        result.extract(smallest)
    with pytest.raises(ParityError, match="is another network"):
        result.to_module(model, smallest)


def test_what_a_model_has_passed_counts_for_the_same_attributes_alone() -> None:
    class Turned(ElasticMlp):
        wrong = False

        def extract(self, subnet: Any) -> nn.Module:
            net = ElasticMlp()
            net.load_state_dict(self.state_dict())
            net.activate(self.space.largest if self.wrong else subnet)
            return net

    model = with_net(Turned())
    model.net.space = model.net.search_space()  # type: ignore[assignment] # no module
    data = DataLoader(digits(), 300)

    def run() -> None:
        search(budget=3).fit(model, dataloaders=data, train_dataloaders=data, progress=False)

    run()
    assert model.validated.n == 3 + 2
    run()
    assert model.validated.n == 3 + 2 + 3  # checked before
    model.net.wrong = True
    with pytest.raises(ParityError, match=r"Look at Turned\.extract\(\)"):
        run()
    del model.net.wrong
    Turned.wrong = True
    with pytest.raises(ParityError, match=r"Look at Turned\.extract\(\)"):
        run()


def test_an_extraction_that_shares_weights_is_refused_in_time() -> None:
    class Shares(ElasticMlp):
        def extract(self, subnet: Any) -> nn.Module:
            net = ElasticMlp()
            net.load_state_dict(self.state_dict())
            net.activate(subnet)
            net.last.weight.data = self.last.weight.data[:]
            return net

    model = with_net(Shares())
    with pytest.raises(ParityError, match=r"shares weights with .* Shares: 'last\.weight'"):
        search().fit(model, Digits(), progress=False)
    assert model.validated.n == 0


def test_what_cannot_be_compared_is_told() -> None:
    class Around(LitMlp):
        """Runs layers of the network, and not the network."""

        forward = L.LightningModule.forward

        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            x = F.linear(batch["pixels"], self.net.first.weight[: self.net.width])
            self.log("val_acc", x.mean())

    model = Around()
    model.net = Wrong()
    x, y = digits().tensors
    rows = [{"pixels": a, "classes": b} for a, b in zip(x, y, strict=True)]
    data = DataLoader(rows, 600)
    with pytest.warns(ParityWarning, match=r"no validation batch goes through its forward\(\)"):
        search(objectives={"val_acc": "max"}, calibration_images=0).fit(
            model, dataloaders=data, progress=False
        )


# Order, ties, statistics, Trainers


def test_values_upside_down_are_refused_before_anything_is_spent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElasticityWarning)
        space = SearchSpace(width=[32, 8])
    model = LitMlp()
    model.net = elastic(
        _Plain(), space=space, activate=lambda net, s: setattr(net, "width", s["width"])
    )
    with pytest.raises(ElasticityError, match="'width'"):
        search(objectives={"val_acc": "max"}).fit(model, Digits(), progress=False)
    assert model.validated.n == 0


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(64, 32), nn.Linear(32, 10), 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        x = F.linear(x, self.first.weight[:w], self.first.bias[:w]).relu()
        return F.linear(x, self.last.weight[:, :w], self.last.bias)


def test_values_that_are_all_equal_get_a_hint() -> None:
    class Dead(LitMlp):
        def validation_step(self, batch: Any, i: int, dataloader_idx: int = 0) -> None:
            self(batch[0])
            self.log("val_acc", batch[0].mean())

    with pytest.warns(ElasticityWarning, match="The first 5 subnets all have val_acc = 0.3"):
        search(objectives={"val_acc": "max"}).fit(Dead(), Digits(), progress=False)


@pytest.mark.parametrize(
    ("own", "renewed", "direction", "n", "warns"),
    [
        (0.939, 0.923, "max", 1000, True),
        (0.924, 0.898, "max", 1000, True),
        (0.924, 0.921, "max", 1000, False),
        (0.930, 0.920, "max", 500, True),  # plain images of the ResNet-56
        (0.930, 0.925, "max", 500, False),
        (0.10, 0.07, "max", 200, False),  # at chance
        (0.924, 0.940, "max", 1000, False),
        (0.939, 0.923, "max", 0, False),  # a share, whose noise is not known
        (0.25, 0.32, "min", 1000, True),
        (0.061, 0.077, "min", 1000, True),  # shares of errors
        (0.061, 0.064, "min", 1000, False),
        (0.69, 0.74, "min", 100, False),  # at chance
        (2.0, 2.05, "min", 1000, False),
        (2.0, 2.3, "min", 1000, True),
        (30.0, 25.0, "max", 0, True),
    ],
)
def test_renewal_that_costs_more_than_noise_is_told_with_both_figures(
    own: float, renewed: float, direction: str, n: int, warns: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_renewal({"m": own}, {"m": renewed}, {"m": direction}, n)
    assert [w.category for w in caught] == [CalibrationWarning] * warns
    if warns:
        assert f"{own:.4g}" in str(caught[0].message)
        assert f"{renewed:.4g}" in str(caught[0].message)


def test_calibration_on_other_images_than_those_of_the_training_is_told() -> None:
    class Brighter(Digits):
        def train_dataloader(self) -> Any:
            class Shifted(torch.utils.data.Dataset):
                def __len__(_self) -> int:  # noqa: N805 - the datamodule is self
                    return len(self.train)

                def __getitem__(_self, i: int) -> Any:  # noqa: N805 - as above
                    x, y = self.train[i]
                    return 5 * x * (torch.arange(64) % 3 == 0) + 3, y

            return DataLoader(Shifted(), 50, shuffle=True)

    L.seed_everything(0, verbose=False)
    model, data = LitMlp(), Digits()
    trainer = quiet_trainer(max_epochs=15)
    trainer.fit(model, datamodule=data)
    run = search(objectives={"val_acc": "max"}, budget=2)
    with pytest.warns(CalibrationWarning, match="Renewing the running statistics"):
        run.fit(model, Brighter(), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        run.replace(name="right").fit(model, Digits(), progress=False)


def test_the_trainer_that_trains_is_refused_inside_of_its_callbacks() -> None:
    class Searching(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: LitMlp) -> None:
            with pytest.raises(SearchError, match=r"is at work .*SubnetSearchCallback"):
                search(trainer=trainer).fit(pl_module, Digits(), progress=False)
            inner = search(trainer=quiet_trainer())
            assert len(inner.fit(pl_module, Digits(), progress=False).history) == 6

    trainer = quiet_trainer(max_epochs=1, callbacks=[Searching()])
    trainer.fit(LitMlp(), datamodule=Digits())
    assert trainer.state.finished
    assert search(trainer=trainer).fit(LitMlp(), Digits(), progress=False).history.ok.all()


@pytest.mark.parametrize("tolerance", [-1, 0, 1.5, True, "1e-4", float("nan")])
def test_a_tolerance_is_a_share(tolerance: Any) -> None:
    with pytest.raises(SearchError, match="is not a share above 0 and at most 1"):
        Checks(tolerance=tolerance)


def test_values_differ_by_more_than_a_millionth() -> None:
    nan = float("nan")
    assert differing({"a": 1.0, "b": nan}, {"a": 1.0 + 1e-7, "b": nan}) == []
    assert differing({"a": 1.0, "b": nan, "c": 1}, {"a": 1.00001, "b": 1.0}) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["parity", "repeat", "weights", "calibration", "order"])
@pytest.mark.parametrize("value", [0, "no", None])
def test_a_check_is_made_or_not(name: str, value: Any) -> None:
    with pytest.raises(SearchError, match=rf"^{name}={value!r} is not True or False"):
        Checks(**{name: value})


def test_a_format_is_taken_for_the_runtime_of_it() -> None:
    with pytest.raises(SearchError, match="Did you mean 'onnxruntime'"):
        checked_score("onnx")
