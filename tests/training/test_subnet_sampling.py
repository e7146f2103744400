# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import (
    Choice,
    Measure,
    SearchSpace,
    Subnet,
    SubnetMixin,
    SubnetSampling,
)
from lightning_subnet.errors import ElasticityError, ObjectiveError, SearchError
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from lightning_subnet.training import ProgressiveShrinking, alpha_divergence
from lightning_subnet.training.sampling_rules import Strata
from tests.networks import LitMlp, quiet_trainer
from tests.problems import assert_clear, numpy_state

ROOT = Path(__file__).resolve().parents[2]


class LitNet(L.LightningModule):
    """A tiny elastic MobileNetV3 with BatchNorm, elastic kernels, expansions and depths."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.net = ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)
        self.rate = rate
        self.seen: list[Subnet | None] = []
        self.steps: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen.append(self.net.active_subnet)
        self.steps.append(self.global_step)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.seen.append(self.net.active_subnet)
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Unnormalised(LitNet):
    """The same without BatchNorm, so that a batch is the sum of its halves."""

    def __init__(self) -> None:
        super().__init__()
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())


def loader(n: int = 24, size: int = 8) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def lit(rate: float = 0.1) -> LitNet:
    torch.manual_seed(0)
    return LitNet(rate)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class Keep(L.Callback):
    """Keeps the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, _: Any, module: L.LightningModule, __: Any) -> None:
        self.kept.append(gradients(module))


def by_hand(
    model: LitNet,
    batches: list[Any],
    subnets: list[Subnet],
    *,
    distilled: bool = False,
    label_weight: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return the explicit sum of the subnets' gradients, averaged over accumulated batches."""
    model.train()
    model.zero_grad()
    for x, y in batches:
        teacher = None
        for subnet in subnets:
            model.net.activate(subnet)
            logits = model(x)
            if distilled and teacher is not None:
                loss = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
                loss = loss + label_weight * F.cross_entropy(logits, y)
            else:
                loss = F.cross_entropy(logits, y)
            teacher = logits.detach() if teacher is None else teacher
            (loss / len(batches)).backward()
    return gradients(model)


def assert_equal_gradients(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6
) -> None:
    for name in one.keys() | other.keys():
        a = one.get(name, torch.zeros(()))
        b = other.get(name, torch.zeros(()))
        torch.testing.assert_close(
            a.expand_as(b) if name not in one else a,
            b if name in other else b.expand_as(a),
            rtol=1e-4,
            atol=tolerance,
            msg=name,
        )


@pytest.mark.parametrize(
    "settings", [{}, {"distill": True}, {"distill": True, "label_weight": 0.5}], ids=str
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_are_the_explicit_sum(settings: dict[str, Any], accumulated: int) -> None:
    model, keep = lit(), Keep()
    sampling = SubnetSampling("sandwich", n_random=2, **settings)
    trainer = quiet_trainer(
        max_steps=1, callbacks=[sampling, keep], accumulate_grad_batches=accumulated
    )
    trainer.fit(model, loader())
    assert len(keep.kept) == 1
    batches = list(loader())[:accumulated]
    expected = by_hand(
        lit(), batches, sampling.subnets(0),
        distilled="distill" in settings, label_weight=settings.get("label_weight", 0.0),
    )  # fmt: skip
    assert_equal_gradients(keep.kept[0], expected)


def test_the_subnets_of_a_step_depend_on_seed_and_step_only() -> None:
    model, sampling = lit(), SubnetSampling("sandwich", n_random=2, seed=3)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, loader())
    space = model.net.search_space()
    for step in range(3):
        seen = [s for s, t in zip(model.seen, model.steps, strict=True) if t == step]
        assert seen == sampling.subnets(step)
        assert seen[:2] == [space.largest, space.smallest]
        assert len(set(seen)) == 4
    assert sampling.subnets(0)[2:] != sampling.subnets(1)[2:]


def test_by_turns_the_largest_teaches_one_in_each_step() -> None:
    model, keep = lit(rate=0.0), Keep()  # the same weights in every step
    sampling = SubnetSampling("turns", n_random=1, distill=True, label_weight=0.5)
    quiet_trainer(max_epochs=1, callbacks=[sampling, keep]).fit(model, loader())
    space = model.net.search_space()
    assert model.seen[::2] == [space.largest] * 3
    assert model.seen[1::4] == [space.smallest] * 2
    assert model.seen[3] not in (space.smallest, space.largest)
    for step, batch in enumerate(loader()):
        subnets = sampling.subnets(step)
        expected = by_hand(lit(), [batch], subnets, distilled=True, label_weight=0.5)
        assert_equal_gradients(keep.kept[step], expected)


def test_random_rule_and_an_unmodified_module() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale, self.used = nn.Linear(4, 2), 1, []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.used.append(self.scale)
            return (self.layer(batch[0]) * self.scale).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def activate(module: Plain, subnet: Subnet) -> None:
        module.scale = subnet["scale"]

    space = SearchSpace(scale=[1, 2, 3, 4])
    model = Plain()
    sampling = SubnetSampling("random", n_random=2, space=space, activate=activate)
    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, data)
    expected = [s["scale"] for t in range(4) for s in sampling.subnets(t)]
    assert model.used == expected
    assert len(set(expected)) > 2
    assert model.scale == 4  # the largest stays in force


def test_what_lightning_counts_is_as_without_the_callback() -> None:
    class Clipped(LitNet):
        norms: ClassVar[list[float]] = []

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            self.norms.append(torch.cat([g.flatten() for g in gradients(self).values()]).norm())

    def trained(callbacks: list[L.Callback]) -> tuple[L.Trainer, LitNet]:
        torch.manual_seed(0)
        model = Clipped()
        trainer = quiet_trainer(
            max_epochs=2, callbacks=callbacks, accumulate_grad_batches=2, gradient_clip_val=0.5
        )
        trainer.fit(model, loader())
        return trainer, model

    plain, _ = trained([])
    shared, _ = trained([SubnetSampling(n_random=1)])
    assert shared.global_step == plain.global_step
    rates = [t.optimizers[0].param_groups[0]["lr"] for t in (plain, shared)]
    assert rates[0] == rates[1]
    assert len(Clipped.norms) == 2 * 4
    assert max(Clipped.norms) <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("kind", "goal", "accumulated"),
    [
        pytest.param("batchnorm", "labels", 1, marks=pytest.mark.slow),
        pytest.param("plain", "labels", 1, marks=pytest.mark.slow),
        pytest.param("plain", "distill", 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_average_over_their_halves(
    kind: str, goal: str, accumulated: int, tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "tests.programs.ddp_sampling_program"]
    command = [*program, str(tmp_path), kind, goal, str(accumulated)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    gradient, other = (rank["gradients"] for rank in ranks)
    for name in gradient:
        assert torch.equal(gradient[name], other[name]), name
    weights = [torch.load(tmp_path / f"weights{i}.pt") for i in range(2)]
    for name, _ in LitNet().named_parameters():
        assert name not in weights[0] or torch.equal(weights[0][name], weights[1][name]), name

    torch.manual_seed(0)
    model = LitNet() if kind == "batchnorm" else Unnormalised()
    sampling = SubnetSampling(n_random=2)
    sampling._part = model.net
    halves = [rank["batches"] for rank in ranks]
    assert [len(half) for half in halves] == [accumulated] * 2
    if kind == "batchnorm":  # the mean of the two half-batches, each normalised by itself
        one, two = (by_hand(model, half, sampling.subnets(0)) for half in halves)
        expected = {n: (one[n] + two[n]) / 2 for n in one}
    else:  # the global batch
        whole = [
            [torch.cat(pair) for pair in zip(a, b, strict=True)]
            for a, b in zip(*halves, strict=True)
        ]
        expected = by_hand(model, whole, sampling.subnets(0), distilled=goal == "distill")
    assert_equal_gradients(gradient, expected)


@pytest.mark.slow
def test_ranks_train_one_subnet_each_and_average_once(tmp_path: Path) -> None:
    accumulated = 2
    program = [sys.executable, "-m", "tests.programs.ddp_sampling_program"]
    command = [*program, str(tmp_path), "batchnorm", "ranks", str(accumulated)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    space = lit().net.search_space()
    seen = [[space.subnet(values) for values in rank["seen"]] for rank in ranks]
    drawn = [space.sample(1, np.random.default_rng([0, number]))[0] for number in (0, 1)]
    last = [space.smallest, drawn[0], space.smallest, drawn[1]]
    assert seen[0] == [space.largest] * 4 * accumulated  # one pass a batch
    assert seen[1] == [s for s in last for _ in range(accumulated)]

    torch.manual_seed(0)
    model = LitNet()
    one, two = (
        by_hand(model, rank["batches"][:accumulated], [subnet])
        for rank, subnet in zip(ranks, (space.largest, space.smallest), strict=True)
    )
    zero = torch.zeros(())
    expected = {n: (one.get(n, zero) + two.get(n, zero)) / 2 for n in one | two}
    assert set(one) != set(two)  # kernels are transformed in the smallest alone
    for rank in ranks:
        assert set(rank["gradients"]) == set(expected)
        assert_equal_gradients(rank["gradients"], expected)
    weights = [torch.load(tmp_path / f"weights{i}.pt") for i in range(2)]
    for name, _ in model.named_parameters():  # after steps with gradients of other parameters
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_mixed_precision_adds_up_too() -> None:
    model, keep = lit(), Keep()
    sampling = SubnetSampling(n_random=1)
    trainer = quiet_trainer(max_steps=1, callbacks=[sampling, keep], precision="bf16-mixed")
    trainer.fit(model, loader())
    expected = by_hand(lit(), list(loader())[:1], sampling.subnets(0))
    got = keep.kept[0]
    a = torch.cat([got[n].flatten() for n in expected])
    b = torch.cat([g.flatten() for g in expected.values()])
    assert F.cosine_similarity(a, b, dim=0) > 0.99
    assert 0.9 < a.norm() / b.norm() < 1.1


def test_validation_checkpoints_and_statistics_belong_to_the_largest(tmp_path: Path) -> None:
    model = lit()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SubnetSampling(n_random=1), checkpoint],
    )  # fmt: skip
    trainer.fit(model, loader(), loader())
    largest = model.net.search_space().largest
    validated = [s for s in model.seen if s is not None]
    assert model.net.active_subnet == largest
    assert checkpoint.best_model_path
    assert validated.count(largest) == 2 * 3 + 2 * 3 + 2  # training, validation, sanity check
    alone = lit()  # the same steps, but the statistics of the largest alone
    alone.net.activate(largest)
    alone.train()
    alone(next(iter(loader()))[0])
    first = lit()
    quiet_trainer(max_steps=1, callbacks=[SubnetSampling(n_random=2)]).fit(first, loader())
    buffers = dict(alone.named_buffers())
    for name, buffer in first.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)


def test_a_checkpoint_in_mid_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def sampling() -> SubnetSampling:
        return SubnetSampling(n_random=2, distill=True)

    straight = lit()
    quiet_trainer(max_epochs=3, callbacks=[sampling()]).fit(straight, loader())
    half = lit()
    trainer = quiet_trainer(max_epochs=1, callbacks=[sampling()])
    trainer.fit(half, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = LitNet()
    quiet_trainer(max_epochs=3, callbacks=[sampling()]).fit(
        rest, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False
    )
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value, msg=name)


def test_only_the_first_subnet_logs(tmp_path: Path) -> None:
    class Counting(LitNet):
        def log(self, name: str, value: Any, **options: Any) -> None:
            self.logged = [*getattr(self, "logged", []), name]
            super().log(name, value, **options)

    torch.manual_seed(0)
    model = Counting()
    quiet_trainer(max_steps=2, callbacks=[SubnetSampling(n_random=2)]).fit(model, loader())
    assert model.logged == ["train_loss"] * 2
    assert "log" not in vars(model)
    assert "forward" not in vars(model)


def test_distillation_by_the_name_of_a_submodule() -> None:
    class Inner(LitNet):
        def forward(self, x: torch.Tensor) -> Any:
            return {"logits": self.net(x)}

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

    torch.manual_seed(0)
    model, keep = Inner(), Keep()
    sampling = SubnetSampling(n_random=1, distill="net")
    quiet_trainer(max_steps=1, callbacks=[sampling, keep]).fit(model, loader())
    expected = by_hand(lit(), list(loader())[:1], sampling.subnets(0), distilled=True)
    assert_equal_gradients(keep.kept[0], expected)

    class Scores(LitNet):
        def forward(self, x: torch.Tensor) -> Any:
            return {"scores": self.net(x)}

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0])["scores"], batch[1])

    torch.manual_seed(0)
    with pytest.raises(SearchError, match="'scores'"):
        quiet_trainer(max_steps=1, callbacks=[SubnetSampling(distill=True)]).fit(Scores(), loader())


def test_bad_input_is_refused_before_training() -> None:
    class Manual(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    for arguments, message in [
        ({"rule": "sandwhich"}, "Did you mean 'sandwich'"),
        ({"n_random": 0}, "At least one random subnet"),
        ({"n_random": 1.5}, "At least one random subnet"),
        ({"space": SearchSpace(a=[1, 2])}, "go together"),
        ({"rule": "random", "distill": True}, "needs rule='sandwich' or 'turns'"),
        ({"rule": "ranks", "distill": True}, "needs rule='sandwich' or 'turns'"),
        ({"rule": "ranks", "n_random": 3}, "does not go with rule='ranks'"),
        ({"distill": True, "distill_loss": "alfa"}, "Did you mean 'alpha'"),
        ({"distill_loss": "alpha"}, "distill_loss= is for distillation"),
        ({"label_weight": 1.0}, "label_weight=1.0 is the share of labels beside distillation"),
        ({"distill": True, "label_weight": -1.0}, "finite number of at least 0"),
        ({"schedule": {"ks.*": 2}}, "Give a ProgressiveShrinking"),
        ({"stratify": 3}, "Give 'macs', 'params' or a Measure"),
    ]:
        with pytest.raises(SearchError, match=message):
            SubnetSampling(**arguments)
    kernels = ProgressiveShrinking({"k.*": 1, "*": 1})
    for model, sampling, message in [
        (Manual(), SubnetSampling(), "optimises manually"),
        (LitNet(), SubnetSampling(distill="nett"), "Did you mean 'net'"),
        (LitNet(), SubnetSampling("ranks"), "this training has one process"),
        (LitNet(), SubnetSampling(schedule=kernels), r"Did you mean 'ks.\*'"),
        (LitNet(), SubnetSampling(stratify="mac"), "Did you mean 'macs'"),
    ]:
        with pytest.raises(SearchError, match=message):
            quiet_trainer(max_steps=1, callbacks=[sampling]).fit(model, loader())
        assert not model.seen


def test_an_activate_that_raises_ends_training_clearly() -> None:
    def broken(module: Any, subnet: Subnet) -> None:
        raise RuntimeError("no such width")

    class Plain(LitNet):
        pass

    sampling = SubnetSampling(space=SearchSpace(a=[1, 2]), activate=broken)
    with pytest.raises(RuntimeError, match="no such width"):
        quiet_trainer(max_steps=1, callbacks=[sampling]).fit(Plain(), loader())


class ElasticItself(SubnetMixin, L.LightningModule):
    """A LightningModule that is elastic, and computes inside training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.width, self.seen = nn.Linear(64, 16), 16, []

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=[4, 8, 16])

    def activate(self, subnet: Subnet) -> None:
        self.width = subnet["width"]

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen.append(self.active_subnet)
        return self.layer(batch[0].flatten(1))[:, : self.width].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_logits_is_refused_before_it_learns() -> None:
    itself = ElasticItself()
    with pytest.raises(SearchError, match=r"has no forward\(\), so distill=True finds no logits"):
        quiet_trainer(max_steps=1, callbacks=[SubnetSampling(distill=True)]).fit(itself, loader())
    assert not itself.seen
    for source, message in [
        ("layer", r"gave \(8, 1\) torch.float32"),  # no classes
        ("wide", r"\(8, 16\) for the largest subnet and \(8, 4\) for another"),
    ]:

        class NoLogits(ElasticItself):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.wide = nn.Linear(64, 1), nn.Identity()

            def training_step(self, batch: Any, _: int) -> torch.Tensor:
                x = self.wide(batch[0].flatten(1)[:, : self.width])
                return self.layer(batch[0].flatten(1)).mean() + x.mean()

        model = NoLogits()
        weight = model.layer.weight.clone()
        trainer = quiet_trainer(max_steps=1, callbacks=[SubnetSampling(distill=source)])
        with pytest.raises(SearchError, match=message):
            trainer.fit(model, loader())
        assert trainer.global_step == 0
        assert torch.equal(model.layer.weight, weight)


def test_a_loss_of_ones_own_takes_what_is_no_class() -> None:
    class Single(ElasticItself):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x.flatten(1))[:, : self.width]
            return F.linear(x, self.head.weight[:, : self.width])[:, 0]

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self(batch[0]).square().mean()

    sampling = SubnetSampling(distill=True, distill_loss=F.mse_loss)
    trainer = quiet_trainer(max_steps=1, callbacks=[sampling])
    trainer.fit(Single(), loader())
    assert trainer.global_step == 1


def test_alpha_divergence_by_name_is_the_function() -> None:
    kept = []
    for loss in ("alpha", alpha_divergence, "soft"):
        keep = Keep()
        sampling = SubnetSampling(n_random=1, distill=True, distill_loss=loss)
        quiet_trainer(max_steps=1, callbacks=[sampling, keep]).fit(lit(), loader())
        kept.append(keep.kept[0])
    assert_equal_gradients(kept[0], kept[1])
    name = "net.classifier.weight"
    assert not torch.allclose(kept[0][name], kept[2][name])


def test_stratified_subnets_are_those_of_the_strata() -> None:
    model = lit()
    sampling = SubnetSampling("random", n_random=2, stratify="macs", seed=2)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, loader())
    space = model.net.search_space()
    macs = next(m for m in model.net.exact_measures() if m.name == "macs")
    strata = Strata(space, macs, seed=2)
    assert model.seen == [s for t in range(3) for s in strata.draw(2, t)]
    own = Measure("sum", lambda X: X.sum(1), exact=True, takes="indices")
    again = lit()
    sampling = SubnetSampling("random", n_random=2, stratify=own, seed=2)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(again, loader())
    assert again.seen == [s for t in range(3) for s in Strata(space, own, seed=2).draw(2, t)]


def test_a_network_without_tables_is_counted_on_its_example() -> None:
    def data() -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8)), batch_size=4)

    model, sampling = LitMlp(), SubnetSampling(stratify="macs")
    with pytest.raises(SearchError, match="Set example_input_array of LitMlp"):
        quiet_trainer(max_steps=1, callbacks=[sampling]).fit(model, data())
    model.example_input_array = torch.zeros(1, 64)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, data())  # 12 subnets are few
    noisy = Measure("latency_ms", lambda X: X.sum(1), takes="indices")
    with pytest.raises(ObjectiveError, match="is not exact"):
        quiet_trainer(max_steps=1, callbacks=[SubnetSampling(stratify=noisy)]).fit(model, data())


class LitAdam(LitNet):
    """With momenta, which the sorting of channels has to take along."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def adam() -> LitAdam:
    torch.manual_seed(0)
    return LitAdam()


def same(n_batches: int = 3) -> DataLoader:
    """Return equal batches, so that it does not matter that a loader begins anew in mid-epoch."""
    x, y = next(iter(loader(8)))
    return DataLoader(TensorDataset(x.repeat(n_batches, 1, 1, 1), y.repeat(n_batches)), 8)


SCHEDULES = {
    "steps": ProgressiveShrinking(
        {"ks.*": 2, "d.*": (2, 3), "e.*": (3, 9)}, unit="steps", warmup=1, sort="e.*"
    ),
    "epochs": ProgressiveShrinking({"ks.*": 1, "d.*": (1, 1), "e.*": 2}, sort=("e.*", "ks.*")),
}


def test_a_schedule_trains_what_is_open_and_logs_its_phase() -> None:
    class Phases(L.Callback):
        def __init__(self) -> None:
            self.logged: list[float] = []
            self.shown: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.logged.append(trainer.callback_metrics["shrinking_phase"].item())
            self.shown.append(trainer.progress_bar_metrics["shrinking_phase"])

    model, phases = adam(), Phases()
    sampling = SubnetSampling(n_random=2, schedule=SCHEDULES["steps"], stratify="macs")
    quiet_trainer(max_epochs=5, callbacks=[sampling, phases]).fit(model, loader())
    expected = [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5]
    assert phases.logged == phases.shown == expected
    space = model.net.search_space()
    by_step = [
        [s for s, t in zip(model.seen, model.steps, strict=True) if t == step] for step in range(15)
    ]
    assert by_step == [sampling.subnets(step) for step in range(15)]
    assert by_step[0] == [space.largest]
    for step, phase in enumerate(expected[1:], 1):
        part = SCHEDULES["steps"].opened(space, SCHEDULES["steps"].phases[phase])
        assert part is not None
        assert by_step[step][:2] == [space.largest, part.smallest]
        assert all(subnet in part for subnet in by_step[step])
    assert {s["d.1"] for s in by_step[4]} <= {2, 3}
    assert {s["e.0"] for s in by_step[7]} == {4}


@pytest.mark.parametrize(
    ("unit", "stop", "end"),
    [
        # Within phases 2, 3, 5; 8: at a sorting.
        *[pytest.param("steps", stop, 15, marks=pytest.mark.slow) for stop in (4, 6, 12)],
        ("steps", 8, 15),
        pytest.param("epochs", 2, 5, marks=pytest.mark.slow),
        ("epochs", 3, 5),
    ],
)
def test_a_training_resumes_anywhere_in_a_schedule(
    unit: str, stop: int, end: int, tmp_path: Path
) -> None:
    straight, schedule = _straight(unit)
    stopped = adam()
    callback = [SubnetSampling(schedule=schedule)]
    trainer = quiet_trainer(**{f"max_{unit}": stop}, callbacks=callback)
    trainer.fit(stopped, same())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed = LitAdam()
    callback = [SubnetSampling(schedule=schedule)]
    trainer = quiet_trainer(**{f"max_{unit}": end}, callbacks=callback)
    trainer.fit(resumed, same(), ckpt_path=tmp_path / "part.ckpt", weights_only=False)
    assert stopped.seen + resumed.seen == straight.seen
    assert stopped.steps + resumed.steps == straight.steps
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def _straight(unit: str) -> tuple[LitAdam, ProgressiveShrinking]:
    model, schedule = adam(), SCHEDULES[unit]
    trainer = quiet_trainer(max_epochs=5, callbacks=[SubnetSampling(schedule=schedule)])
    trainer.fit(model, same())
    return model, schedule


def test_sorting_before_a_width_phase_changes_nothing_that_was_open() -> None:
    class Look(L.Callback):
        """Keeps the logits of the smallest open subnet before each step, and after its start."""

        def __init__(self) -> None:
            self.logits: list[torch.Tensor] = []

        def on_train_batch_start(self, trainer: Any, module: LitNet, *_: Any) -> None:
            net, space = copy.deepcopy(module.net).eval(), module.net.search_space()
            opened = SCHEDULES["steps"].opened(space, SCHEDULES["steps"].phases[3])
            assert opened is not None
            net.activate(opened.smallest)
            with torch.no_grad():
                self.logits.append(net(x))
            weight = module.net.blocks[0].project[0].weight
            self.weight = weight.detach()[..., 0, 0].clone()
            known = trainer.optimizers[0].state.get(weight, {"exp_avg": weight.detach()})
            self.momentum = known["exp_avg"][..., 0, 0].clone()

    x = torch.randn(4, 1, 8, 8)
    before, after = Look(), Look()
    sampling = SubnetSampling(schedule=SCHEDULES["steps"])
    trainer = quiet_trainer(max_steps=9, callbacks=[before, sampling, after])
    trainer.fit(adam(), loader(72))  # step 8 is the first of the width phase
    order = [(column == before.weight.T).all(1).nonzero().item() for column in after.weight.T]
    assert order != sorted(order)
    assert torch.equal(after.momentum, before.momentum[:, order])  # the optimizer's own too
    torch.testing.assert_close(before.logits[8], after.logits[8], rtol=1e-4, atol=1e-5)


def test_a_schedule_that_sorts_needs_a_network_that_can() -> None:
    def data() -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(8, 64), torch.arange(8)), batch_size=4)

    schedule = ProgressiveShrinking({"*": 1}, sort="*")
    with pytest.raises(SearchError, match="ElasticMlp does not say which channels can be sorted"):
        quiet_trainer(max_steps=1, callbacks=[SubnetSampling(schedule=schedule)]).fit(
            LitMlp(), data()
        )


# The largest subnet is the largest


class LitSliced(L.LightningModule):
    """4 -> width -> 2 with dropout and BatchNorm, around an elastic child or elastic itself."""

    def __init__(self, widths: Any, calls: str = "by name") -> None:
        super().__init__()
        self.net = Sliced(widths)
        self.calls = calls

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        if self.calls == "a method":
            return F.cross_entropy(self.net.logits(x), y)
        return F.cross_entropy(self.net(x=x) if self.calls == "by name" else self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sliced(SubnetMixin, nn.Module):
    def __init__(self, widths: Any) -> None:
        super().__init__()
        self.widths = widths
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.width, self.passes = 8, 0

    def search_space(self) -> SearchSpace:
        return SearchSpace(width=self.widths)

    def activate(self, subnet: Subnet) -> None:
        self.width = subnet["width"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.logits(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        w = self.width
        h = F.linear(self.drop(self.norm(x)), self.first.weight[:w], self.first.bias[:w])
        return F.linear(h.relu(), self.last.weight[:, :w], self.last.bias)


def sliced(widths: Any, calls: str = "by name", **settings: Any) -> LitSliced:
    """Return a module that was trained for two steps."""
    L.seed_everything(0, verbose=False)
    model = LitSliced(Choice(widths, ordered=True), calls)
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 4, generator=g), torch.randint(2, (16,), generator=g))
    trainer = quiet_trainer(max_epochs=1, callbacks=[SubnetSampling(n_random=1, **settings)])
    trainer.fit(model, DataLoader(data, batch_size=8))
    return model


@pytest.mark.parametrize("calls", ["by name", "by place"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": "random"},
        {"distill": "net"},
        {"schedule": ProgressiveShrinking({"width": 1}, unit="steps", warmup=1)},
    ],
    ids=str,
)
def test_a_largest_that_costs_less_ends_the_training(calls: str, settings: Any) -> None:
    with pytest.raises(ElasticityError) as caught:
        sliced([8, 4, 2], calls, **settings)
    # 8 rows x (4 x width + width x 2)
    assert_clear(
        caught.value,
        "The largest subnet of Sliced costs less than the smallest: 96 MACs, and 384.",
        "The last value of 'width', 2, is cheaper than its first, 8.",
    )
    trained = sliced([8, 4, 2], calls, checks=False, **settings)
    assert trained.net.active_subnet == trained.net.search_space().largest


@pytest.mark.parametrize("settings", [{}, {"distill": "net"}], ids=str)
def test_the_check_costs_two_passes_and_changes_no_number(settings: Any) -> None:
    models, states = [], []
    for checks in (False, True):
        models.append(sliced([2, 4, 8], checks=checks, **settings))
        states.append((torch.get_rng_state(), numpy_state(), random.getstate()))
    assert models[1].net.passes == models[0].net.passes + 2
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]
    assert models[1].net.active_subnet == models[1].net.search_space().largest
    assert not models[1].net._forward_pre_hooks


def test_a_step_that_calls_methods_is_checked_by_the_example_input() -> None:
    sliced([8, 4, 2], "a method")  # nothing shows its costs

    class WithExample(LitSliced):
        def __init__(self) -> None:
            super().__init__(Choice([8, 4, 2], ordered=True), "a method")
            self.example_input_array = torch.zeros(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net.logits(x)

    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    trainer = quiet_trainer(max_epochs=1, callbacks=[SubnetSampling()])
    with pytest.raises(ElasticityError, match="96 MACs, and 384"):
        trainer.fit(WithExample(), DataLoader(TensorDataset(x, y), batch_size=8))


def test_a_training_that_goes_on_is_checked_again() -> None:
    model = LitSliced([2, 4, 8])
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    sampling = SubnetSampling(n_random=1)
    quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, data)
    model.net.widths = Choice([8, 2], ordered=True)
    with pytest.raises(ElasticityError, match="'width', 2, is cheaper than its first, 8"):
        quiet_trainer(max_epochs=1, callbacks=[sampling]).fit(model, data)
    assert model.net.active_subnet == model.net.search_space().largest


class Dictionary(nn.Module):
    """A network whose output is a dict, as those of transformers."""

    def __init__(self, net: nn.Module, key: str = "logits") -> None:
        super().__init__()
        self.net, self.key = net, key

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"loss": None, self.key: self.net(x)}


class Wrapped(LitNet):
    """The step takes the logits out of a dict."""

    def __init__(self, key: str = "logits") -> None:
        super().__init__()
        self.inner, self.key = Dictionary(self.net, key), key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[self.key]


def teacher_and_model() -> tuple[nn.Module, LitNet]:
    torch.manual_seed(1)
    teacher = ElasticMobileNetV3.tiny(n_classes=10, dropout=0.0)
    return teacher, lit()


def grads_of(model: LitNet, **options: Any) -> dict[str, torch.Tensor]:
    keep = Keep()
    sampling = SubnetSampling(n_random=1, **options)
    quiet_trainer(max_steps=1, callbacks=[sampling, keep]).fit(model, loader())
    return keep.kept[0]


@pytest.mark.parametrize(("label_weight", "others"), [(0.0, None), (0.5, 1.0)])
def test_a_teacher_of_its_own_teaches_all_subnets(label_weight: float, others: Any) -> None:
    teacher, model = teacher_and_model()
    before = copy.deepcopy(teacher.state_dict())
    expected = copy.deepcopy(model)
    options = {"label_weight": label_weight, "others_weight": others}
    grads = grads_of(model, distill=teacher, **options)
    x, y = next(iter(loader()))
    with torch.no_grad():
        target = teacher.eval()(x).softmax(1)
    assert not teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    weights = [1.0, *([1 / 2] * 2 if others is None else [others] * 2)]
    for weight, subnet in zip(weights, model.seen[:3], strict=True):
        expected.net.activate(subnet)
        out = expected.net(x)
        loss = F.cross_entropy(out, target) + label_weight * F.cross_entropy(out, y)
        (weight * loss).backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_is_no_part_of_the_module(tmp_path: Path) -> None:
    teacher, model = teacher_and_model()
    names = [*model.state_dict()]
    trainer = quiet_trainer(max_steps=1, callbacks=[SubnetSampling(distill=teacher)])
    trainer.fit(model, loader())
    assert [*model.state_dict()] == names
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    n_weights = sum(len(g["params"]) for g in trainer.optimizers[0].param_groups)
    assert n_weights == len([*model.parameters()])
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert [*checkpoint["state_dict"]] == names
    assert model.training_step.__func__ is LitNet.training_step  # the step is its own again


@pytest.mark.parametrize("rule", ["random", "sandwich", "turns"])
def test_teachers_go_with_rules_without_a_largest(rule: Any) -> None:
    teacher, model = teacher_and_model()
    before = copy.deepcopy(model.state_dict())
    sampling = SubnetSampling(rule, n_random=2, distill=teacher)
    quiet_trainer(max_steps=2, callbacks=[sampling]).fit(model, loader())
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_logits_come_out_of_dicts() -> None:
    teacher, plain = teacher_and_model()
    expected = grads_of(plain, distill=teacher)
    model = Wrapped()
    model.load_state_dict({**model.state_dict(), **plain_state(lit())})
    grads = grads_of(model, distill=Dictionary(teacher), logits="inner")
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient)
    in_place = {}
    for name in ("net", "inner"):
        model = Wrapped()
        model.load_state_dict({**model.state_dict(), **plain_state(lit())})
        in_place[name] = grads_of(model, distill=name)
    for name, gradient in in_place["net"].items():
        torch.testing.assert_close(in_place["inner"][name], gradient)


def plain_state(model: LitNet) -> dict[str, torch.Tensor]:
    state = model.net.state_dict()
    return {f"{before}.{k}": v for k, v in state.items() for before in ("net", "inner.net")}


def test_bad_teachers_are_refused() -> None:
    teacher, model = teacher_and_model()

    def fails(match: str, model: LitNet, **options: Any) -> None:
        with pytest.raises(SearchError, match=match) as error:
            quiet_trainer(max_steps=1, callbacks=[SubnetSampling(**options)]).fit(model, loader())
        assert_clear(error)

    fails("shares weights with LitNet", model, distill=model.net)
    other = Dictionary(teacher, key="scores")
    fails(r"a dict with 'loss', 'scores', of which none", model, distill=other)
    fails(r"a dict with 'loss', 'scores'", Wrapped("scores"), distill="inner")
    fails("Did you mean 'inner'", Wrapped(), distill=teacher, logits="inne")
    narrow = ElasticMobileNetV3.tiny(n_classes=4, dropout=0.0)
    fails(r"\(8, 4\) for the teacher and \(8, 10\) for a subnet", lit(), distill=narrow)
    for options, match in (
        ({"distill": 3}, "distill=3 is not True"),
        ({"logits": "net"}, "goes with a teacher"),
        ({"others_weight": 0}, "others_weight=0 is not"),
    ):
        with pytest.raises(SearchError, match=match):
            SubnetSampling(**options)  # type: ignore[arg-type] # wrong on purpose
