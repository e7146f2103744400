# SPDX-License-Identifier: Apache-2.0
"""Which elements of a weight a tensor holds, by its place in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from lightning_subnet.elasticity.slicing.regions import Memory, Part, Region, WeightReader


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape))


def memory_of(holder: Holder) -> Memory:
    return Memory(holder)


def numbers_in(region: Region, holder: Holder) -> torch.Tensor:
    """The elements of a block in the order of the tensor, found by slicing a numbered weight."""
    if region.index is not None:
        return region.index
    assert region.box is not None
    block = torch.arange(holder.weight.numel()).view(holder.weight.shape)
    for d, steps in enumerate(region.box):
        block = block.index_select(d, steps.positions)
    along = [d for d in region.order if d is not None]
    order = along + [d for d in range(block.ndim) if d not in along]
    return block.permute(order).reshape(region.shape)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda w: w,
    "rows": lambda w: w[:3],
    "block": lambda w: w[1:5, 2:4],
    "every second": lambda w: w[::2, 1::3],
    "one row": lambda w: w[4],
    "one element": lambda w: w[4, 2],
    "a column": lambda w: w[:, 2:3],
    "transposed": lambda w: w[:3].t(),
    "permuted": lambda w: w.permute(1, 0)[:2, :5],
    "split": lambda w: w.view(2, 3, 4)[:, :2].reshape(4, 4),
    "heads": lambda w: w.view(2, 3, 4)[1, :2],
    "flat": lambda w: w.view(-1)[:10],
    "unsqueezed": lambda w: w[None, :2, None],
    "chunk": lambda w: w.chunk(3)[1],
    "diagonal": lambda w: w.diagonal(),
}


@pytest.mark.parametrize("name", list(VIEWS))
@pytest.mark.parametrize("columns_first", [False, True])
def test_a_view_is_known_by_its_memory(name: str, columns_first: bool) -> None:
    holder = Holder(6, 4)
    if columns_first:
        if name in ("split", "heads", "flat"):
            pytest.skip("no view of it")
        holder.weight = nn.Parameter(holder.weight.detach().t().contiguous().t())
    view = VIEWS[name](holder.weight.detach())
    if name == "split":  # a copy
        assert memory_of(holder).region(view) is None
        return
    region = memory_of(holder).region(view)
    assert region is not None
    assert torch.equal(numbers_in(region, holder).float(), view)
    part = Part(region.source, [region])
    assert part.numel == view.numel()
    assert part.whole == (name == "whole")


def test_what_holds_an_element_twice_is_no_region_but_is_read_once() -> None:
    holder = Holder(4, 3)
    memory = memory_of(holder)
    wide = holder.weight.detach()[:2, None].expand(2, 5, 3)
    assert memory.region(wide) is None
    read = memory.read(wide)
    assert read is not None
    assert read.numel == 6
    windows = holder.weight.detach().view(-1).unfold(0, 4, 1)
    assert memory.region(windows) is None
    read = memory.read(windows)
    assert read is not None
    assert read.numel == 12
    assert memory.region(torch.zeros(3)) is None


@given(data=st.data())
def test_any_slice_of_any_permutation(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    holder = Holder(*shape)
    view = holder.weight.detach().permute(data.draw(st.permutations(range(len(shape)))))
    for d, n in enumerate(view.shape):
        first = data.draw(st.integers(0, n - 1))
        last = data.draw(st.integers(first + 1, n))
        step = data.draw(st.integers(1, 3))
        view = view[(slice(None),) * d + (slice(first, last, step),)]
    region = memory_of(holder).region(view)
    assert region is not None
    assert torch.equal(numbers_in(region, holder).float(), view)


def test_a_reader_follows_copies_and_sees_what_is_computed_with() -> None:
    holder = Holder(6, 4)
    reader = WeightReader(holder)
    index = torch.tensor([4, 0])
    x = torch.ones(2, dtype=torch.int64)
    reader.vary([x])
    with torch.no_grad(), reader:
        rows = torch.cat([holder.weight[:2], holder.weight[3:4]])
        copied = rows.index_select(0, torch.tensor([2, 1])).contiguous().t().clone()
        _ = copied.sum()
    part = reader.parts()["weight"]
    assert part.single
    assert part.numel == 8
    assert [p.tolist() for p in part.positions] == [[1, 3], [0, 1, 2, 3]]
    with torch.no_grad(), reader:
        _ = holder.weight[index].sum()  # four and nought
        _ = holder.weight[x + 1].sum()  # by an input: any
    assert reader.parts()["weight"].numel == 24


def test_parts_of_several_reads_are_the_block_around_them() -> None:
    holder = Holder(6, 4)
    reader = WeightReader(holder)
    with torch.no_grad(), reader:
        _ = holder.weight[:2, :3].sum() + holder.weight[:4, :1].sum()
    part = reader.parts()["weight"]
    assert not part.single
    assert (part.block, part.numel) == ((4, 3), 12)
    assert not part.whole


def test_weights_that_share_memory_are_one_source() -> None:
    holder = Holder(6, 4)
    holder.tied = nn.Parameter(holder.weight.detach()[:3])
    holder.register_buffer("index", torch.arange(3), persistent=False)
    sources = list(memory_of(holder).sources)
    assert [s.name for s in sources] == ["weight", "index"]
    assert [s.persistent for s in sources] == [True, False]
