# SPDX-License-Identifier: Apache-2.0
"""One renewal of running statistics: passes over batches, and what they show of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_subnet._messages import listed
from lightning_subnet._torch.contexts import random_state
from lightning_subnet._torch.inputs import cloned
from lightning_subnet.elasticity.statistics import (
    Key,
    Place,
    Snapshot,
    Sums,
    Watch,
    has_named_statistics,
    norms,
    others,
    tracks,
)
from lightning_subnet.errors import MeasurementError


@dataclass
class Known:
    """What passes have shown of the layers of a network.

    Attributes:
        always: Normalisations whose holder passes a training flag of its own on, in their place.
        active: Other modules that are in training mode, as their own statistics, or those of a
            layer that they hold, do not move otherwise.
        own: Layers that move buffers by other means than torch's functions; the names of these.
        counters: Numbers among such buffers that are no averages.
        constant: Layers that training does not move either.
        odd: Layers whose buffers are no running average, so that they cannot be renewed.
        works: Whether any statistics were renewed; another subnet may have no layer with them.
    """

    always: set[nn.Module] = field(default_factory=set)
    active: set[nn.Module] = field(default_factory=set)
    own: dict[nn.Module, set[str]] = field(default_factory=dict)
    counters: set[Key] = field(default_factory=set)
    constant: set[nn.Module] = field(default_factory=set)
    odd: set[nn.Module] = field(default_factory=set)
    works: bool = False

    def __len__(self) -> int:
        sets = (self.always, self.active, self.constant, self.odd)
        return sum(len(x) for x in sets) + sum(len(x) for x in self.own.values())

    def forget_all_but(self, layers: set[nn.Module]) -> None:
        """Drop what is known of other networks' layers."""
        for of_others in (self.always, self.active, self.constant, self.odd):
            of_others.intersection_update(layers)
        self.own = {layer: names for layer, names in self.own.items() if layer in layers}
        self.counters = {key for key in self.counters if key[0] in layers}


@dataclass(frozen=True)
class Share:
    """What a batch contributes to a running average in one pass.

    Args:
        where: The elements that the pass moves, as a mask.
        new: The share of the new statistics, from above 0 to 1: the momentum, if it runs once.
    """

    where: torch.Tensor
    new: float


# From 0 and from this value a running average is told: its distance shrinks. fp16 can hold it.
_HIGH = 4096.0


class Renewal:
    """One renewal of the statistics of a module, which is in eval mode and without gradients.

    Args:
        module: The network.
        run: Runs it on a batch.
        known: What is known of its layers; passes add to it.
        paused: Normalisations that keep their statistics.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Any], Any], known: Known, paused: set[nn.Module]
    ) -> None:
        self._module, self._run, self._known = module, run, known
        self._names = {layer: name for name, layer in module.named_modules()}
        known.forget_all_but({*self._names})
        module.train()  # its own train() may freeze layers
        trained = {layer for layer in module.modules() if layer.training}
        module.eval()
        self._paused = paused & trained
        trained -= paused
        every: list[nn.Module] = [*norms(module)]
        self._norms = {x for x in every if tracks(x)} & trained
        self._others = {x for x in others(module) if x in trained} - known.constant
        self._state = Snapshot({*every, *self._others})
        self._uses: set[nn.Module] = set()
        self._renewed: set[nn.Module] = set()
        self._seed = 0  # of what the network draws: of the batch, however often that runs

    def over(self, parts: Iterable[tuple[Any, int]]) -> int:
        """Renew the statistics, and return over how many samples.

        Args:
            parts: Batches, each with the number of its samples.

        Raises:
            MeasurementError: There are no batches, or no layer ran.
        """
        if not self._norms and not self._others:
            self._uses = {*self._paused}
            return 0
        sums, n_used = Sums(), 0
        shares: dict[Key, Share] = {}
        try:
            for part, n in parts:
                if n_used:
                    watch = self._go(part)
                else:
                    watch, shares = self._first(part)
                    if not self._norms and not self._known.active & self._others:
                        break
                sums.update(watch.sums)
                for key, share in shares.items():
                    value = torch.where(share.where, self._now(key) / share.new, 0)
                    sums.add(key, Place(0, tuple(value.shape), value.stride()), n, value)
                n_used += n
                self._seed += 1
            self._check(sums, n_used)
        finally:
            self._state.restore()
        self._write(sums, shares)
        return n_used

    def _go(
        self,
        part: Any,
        *,
        start: float = 0.0,
        training: Iterable[nn.Module] = (),
        notes: bool = False,
    ) -> Watch:
        """Run the network on a batch, with those layers in training mode that need it."""
        known = self._known
        modes = (self._norms - known.odd) | known.active | {*training}
        for module in self._module.modules():
            if module.training != (module in modes):
                module.training = module in modes
        own = self._own()
        self._state.restore({layer for layer, _ in own})
        for key in own:
            self._state.buffer(key).fill_(start)
        layers = {*self._norms, *self._others, *self._paused}
        watch = Watch(layers, known.always, notes=notes)
        with random_state(self._seed), watch:
            self._run(part)
        return watch

    def _own(self) -> list[Key]:
        """Return the buffers that layers move by means of their own."""
        layers = self._norms | self._others
        return [(x, name) for x, names in self._known.own.items() if x in layers for name in names]

    def _now(self, key: Key) -> torch.Tensor:
        """Return a copy of a buffer as a pass has left it."""
        now = dict(key[0].named_buffers(recurse=False))[key[1]]
        return now.detach().to(torch.promote_types(now.dtype, torch.float32), copy=True)

    def _first(self, part: Any) -> tuple[Watch, dict[Key, Share]]:
        """Run the first batch, and again where it shows what is not known yet of the layers."""
        spare = cloned(part)
        while True:
            high = {}
            if own := self._own():
                self._go(cloned(spare), start=_HIGH)
                high = {key: self._now(key) for key in own}
            watch = self._in_some_mode(part)
            if not self._learn(watch, spare):
                shares = {key: self._share(key, value) for key, value in high.items()}
                if not any(x is None for x in shares.values()):
                    self._uses = watch.uses
                    return watch, {key: x for key, x in shares.items() if x and x.where.any()}
            self._state.restore()
            part = cloned(spare)

    def _in_some_mode(self, part: Any) -> Watch:
        """Run the network; with holders of nothing but normalisations in training mode if need be.

        Some, as those of AttentiveNAS, cannot run in eval mode.
        """
        spare = cloned(part)
        try:
            return self._go(part, notes=True)
        except Exception:
            holders = {x for x in self._module.modules() if self._holds_norms_only(x)}
            holders -= self._known.active
            if not holders:
                raise
            self._known.active |= holders
            try:
                self._state.restore()
                return self._go(spare, notes=True)
            except Exception:
                self._known.active -= holders
            raise

    def _holds_norms_only(self, module: nn.Module) -> bool:
        ends = [x for x in module.modules() if not any(True for _ in x.children())]
        return module not in self._norms and all(x in self._norms for x in ends)

    def _learn(self, watch: Watch, part: Any) -> bool:
        """Return whether a pass has shown something that was not known of the layers."""
        known, before = self._known, len(self._known)
        norms_ = self._norms - known.odd
        moves = self._moves(watch, norms_ | (self._others & known.active))
        self._add_own(moves)
        silent = norms_ - watch.sums.layers - known.own.keys()
        suspects = (silent & watch.uses) - known.constant
        strangers = {
            x
            for x in self._others - known.active - known.odd - known.constant
            if x in watch.uses or isinstance(x, torch.jit.ScriptModule)
        }
        if suspects or strangers:
            # What moves in eval mode too is no running statistic.
            known.constant |= {layer for layer, _ in self._state.changes(strangers)}
            self._try(suspects, strangers - known.constant, part)
        return len(known) > before

    def _moves(self, watch: Watch, layers: Iterable[nn.Module]) -> set[Key]:
        """Return the buffers that moved by other means than torch's functions, if not known yet."""
        return {
            (layer, name)
            for layer, name in self._state.changes(layers)
            if (layer, name) not in watch.sums.items
            and (layer, name) not in self._known.counters
            and name not in self._known.own.get(layer, ())
        }

    def _add_own(self, keys: Iterable[Key]) -> None:
        for layer, name in keys:
            self._known.own.setdefault(layer, set()).add(name)

    def _try(self, suspects: set[nn.Module], strangers: set[nn.Module], part: Any) -> None:
        """Learn how layers are renewed from passes in which more modules are in training mode.

        Args:
            suspects: Normalisations whose buffers are used and did not move.
            strangers: Layers of other classes whose buffers are used.
            part: The batch.
        """
        known = self._known
        near = {x: self._holders(x) for x in suspects}
        for layer in suspects & known.always:  # it normalises in its holder's training mode only
            holders = near.pop(layer)
            if holders <= known.active:
                holders = self._holders(layer, all_of_them=True)
            if holders <= known.active:
                known.odd.add(layer)
            known.active |= holders
        suspects = {*near}
        if not near and not strangers:
            return
        if self._try_with(near, strangers, part):
            known.constant |= strangers - known.active  # they ran, and stayed as they are
        else:  # one of them cannot run in training mode
            if near:
                self._try_with(near, set(), part)
            for layer in strangers:
                constant = self._try_with({}, {layer}, part) or not has_named_statistics(layer)
                (known.constant if constant else known.odd).update({layer} - known.active)
        rest = suspects - known.always - known.own.keys()
        if rest:
            far = {x: self._holders(x, all_of_them=True) for x in rest}
            ran = self._try_with(far, set(), part)
            (known.constant if ran else known.odd).update(rest - known.always - known.own.keys())

    def _try_with(
        self, holders: dict[nn.Module, set[nn.Module]], strangers: set[nn.Module], part: Any
    ) -> bool:
        """Return whether the network ran with these modules in training mode too."""
        known, suspects = self._known, holders.keys()
        with suppress(Exception):
            self._state.restore()
            watch = self._go(cloned(part), training=strangers.union(*holders.values()))
            moves = self._moves(watch, suspects | strangers)
            self._add_own(moves)
            known.always |= suspects & watch.sums.layers
            known.active |= strangers & (watch.sums.layers | {layer for layer, _ in moves})
            for layer in {layer for layer, _ in moves} & suspects:
                known.active |= holders[layer]
            return True
        return False

    def _holders(self, layer: nn.Module, *, all_of_them: bool = False) -> set[nn.Module]:
        """Return the modules that hold a layer: the nearest ones, or all; no mere containers."""
        holders: set[nn.Module] = set()
        front = {layer}
        while front:
            front = {x for x in self._module.modules() if not front.isdisjoint(x.children())}
            found = {x for x in front if not isinstance(x, _CONTAINERS)}
            holders |= found
            front = front if all_of_them else front - found
        return holders

    def _share(self, key: Key, high: torch.Tensor) -> Share | None:
        """Return what a batch contributes to a buffer; None where that is no running average.

        A running average keeps the same share of what each element was. From the starts 0 and h,
        the values after a pass differ by that share of h.
        """
        low = self._now(key)
        where = (low != 0) | (high != _HIGH)
        if not where.any():
            return Share(where, 1.0)
        share = ((high.cpu().double() - low.cpu().double()) / _HIGH)[where.cpu()]
        tolerance = max(1e-4, 4 * torch.finfo(self._state.buffer(key).dtype).eps)
        least, most = share.min().item(), share.max().item()
        if low.ndim == 0 and abs(least - 1) < tolerance:
            self._known.counters.add(key)
            self._known.own[key[0]].discard(key[1])
            return None
        if not (least > -tolerance and most < 1 - tolerance / 10 and most - least < tolerance):
            self._known.odd.add(key[0])
            self._known.active.discard(key[0])
            del self._known.own[key[0]]
            return None
        return Share(where, 1 - share.median().item())

    def _check(self, sums: Sums, n_used: int) -> None:
        """Refuse a renewal in which nothing ran."""
        known = self._known
        if not n_used:
            if not self._norms and not known.active & self._others:
                return
            msg = (
                "There are no batches to recalibrate BatchNorm with. Give inputs of training data."
            )
            raise MeasurementError(msg)
        idle = self._norms - known.constant - known.odd
        if idle and not sums.items and not known.works:
            msg = (
                f"No layer with running statistics ran on the {n_used} samples: "
                f"{listed(self._named(idle))}. Give a forward= that runs the network in which they "
                "are, or use calibration_images=0 where the subnet has none of them."
            )
            raise MeasurementError(msg)

    def _named(self, layers: Iterable[nn.Module]) -> list[str]:
        return sorted(self._names[x] or type(x).__name__ for x in layers)

    def _write(self, sums: Sums, shares: dict[Key, Share]) -> None:
        """Write the statistics in place."""
        for key in sums.items:
            layer = key[0]
            if layer not in self._norms and layer not in self._others:
                continue
            buffer = self._state.buffer(key)
            value = sums.mean(key, buffer)
            if key in shares:
                value = torch.where(shares[key].where, value, buffer)
            buffer.copy_(value)
            self._renewed.add(layer)
            tracked: Any = getattr(layer, "num_batches_tracked", None)
            if layer in self._norms and tracked is not None:
                tracked.fill_(sums.calls(key))
        self._known.works |= bool(self._renewed)

    def messages(self) -> Iterator[tuple[str, str]]:
        """Yield causes and what a user should know of layers that ran and may be frozen, or odd."""
        known = self._known
        if paused := self._paused & self._uses:
            msg = (
                "Layers in eval mode in a module in training mode keep their running statistics, "
                f"as frozen ones do: {listed(self._named(paused))}. If they are to be renewed for "
                "each subnet, call train() on the module first; if they are frozen, set their "
                "track_running_stats to False to say so."
            )
            yield "mode", msg
        weights = {x for x in self._renewed & self._norms if _has_fixed_weights(x)}
        if weights:
            msg = (
                "Layers whose weights are not trained (requires_grad=False) get their running "
                "statistics renewed for each subnet, as training would move them: "
                f"{listed(self._named(weights))}. To keep their statistics, set their "
                "track_running_stats to False, as BaseFinetuning.freeze(train_bn=False) does."
            )
            yield "weights", msg
        if known.odd:
            msg = (
                "Buffers change in training mode, and not as a running average, so that they "
                f"cannot be renewed for each subnet: those of {listed(self._named(known.odd))}. "
                "They stay as they are, and scores depend on the subnets that were trained last."
            )
            yield "odd", msg


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _has_fixed_weights(layer: nn.Module) -> bool:
    weights = [*layer.parameters(recurse=False)]
    return bool(weights) and not any(x.requires_grad for x in weights)
