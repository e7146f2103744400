# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subnet import SearchSpace, Subnet, SubnetSampling
from lightning_subnet.callbacks import soft_cross_entropy
from lightning_subnet.errors import SearchError
from lightning_subnet.supernets.mobilenet_v3 import ElasticMobileNetV3
from tests.networks import quiet_trainer

ROOT = Path(__file__).resolve().parent.parent


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
    model: LitNet, batches: list[Any], subnets: list[Subnet], *, distilled: bool = False
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


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_are_the_explicit_sum(distilled: bool, accumulated: int) -> None:
    model, keep = lit(), Keep()
    sampling = SubnetSampling("sandwich", n_random=2, distill=distilled)
    trainer = quiet_trainer(
        max_steps=1, callbacks=[sampling, keep], accumulate_grad_batches=accumulated
    )
    trainer.fit(model, loader())
    assert len(keep.kept) == 1
    batches = list(loader())[:accumulated]
    expected = by_hand(lit(), batches, sampling.subnets(0), distilled=distilled)
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
    [("batchnorm", "labels", 1), ("plain", "labels", 1), ("plain", "distill", 2)],
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
    torch.manual_seed(0)
    with pytest.raises(SearchError, match="gave a dict"):
        quiet_trainer(max_steps=1, callbacks=[SubnetSampling(distill=True)]).fit(Inner(), loader())


def test_soft_cross_entropy_is_the_explicit_one() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = -(b.softmax(1) * a.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(a, b), expected)


def test_bad_input_is_refused_before_training() -> None:
    class Manual(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    for arguments, message in [
        ({"rule": "sandwhich"}, "Did you mean 'sandwich'"),
        ({"n_random": 0}, "at least one random subnet"),
        ({"n_random": 1.5}, "at least one random subnet"),
        ({"space": SearchSpace(a=[1, 2])}, "go together"),
        ({"rule": "random", "distill": True}, "needs rule='sandwich'"),
    ]:
        with pytest.raises(SearchError, match=message):
            SubnetSampling(**arguments)
    for model, sampling, message in [
        (Manual(), SubnetSampling(), "optimises manually"),
        (LitNet(), SubnetSampling(distill="nett"), "Did you mean 'net'"),
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
