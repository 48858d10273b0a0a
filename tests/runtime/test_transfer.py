"""Packing and moving: everything arrives as it was, in one buffer, aligned as on its own."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.transfer import ALIGN, HostCopy, Packing, read, send, upload

CPU = torch.device("cpu")
DTYPES = (torch.int64, torch.int32, torch.bool)
SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=2), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=9,
)


def tensors(entries: list[tuple[list[int], torch.dtype]]) -> list[torch.Tensor]:
    return [torch.randint(0, 2, shape).to(dtype) for shape, dtype in entries]


@settings(max_examples=60, deadline=None)
@given(entries=SHAPES)
def test_views_are_aligned_and_share_no_byte(entries: list[tuple[list[int], torch.dtype]]) -> None:
    packing = Packing(tuple(tuple(s) for s, _ in entries), tuple(d for _, d in entries))
    buffer = torch.zeros(packing.nbytes + 3 * ALIGN, dtype=torch.uint8)
    views = packing.views(buffer)
    for i, view in enumerate(views):
        assert (list(view.shape), view.dtype) == (entries[i][0], entries[i][1])
        assert view.is_contiguous()
        assert view.storage_offset() * view.element_size() % ALIGN == 0
        before = [other.clone() for other in views]
        view.fill_(1)
        for j, other in enumerate(views):
            assert j == i or torch.equal(other, before[j])
    used = sum(view.numel() * view.element_size() for view in views)
    assert used <= packing.nbytes <= used + len(views) * (ALIGN - 1)
    assert not buffer[packing.nbytes :].any()


@settings(max_examples=40, deadline=None)
@given(entries=SHAPES)
def test_an_upload_is_one_buffer(entries: list[tuple[list[int], torch.dtype]]) -> None:
    given_ = tensors(entries)
    moved = upload(given_, CPU)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    for tensor, before in zip(moved, given_, strict=True):
        assert tensor.dtype == before.dtype and torch.equal(tensor, before)
        before.fill_(0)
        assert not tensor.numel() or tensor.data_ptr() != before.data_ptr()


def test_what_is_on_the_device_stays_there() -> None:
    there = torch.empty(3, device="meta")
    here = torch.arange(5)
    first, second = upload([there, here], CPU)
    assert first is there and torch.equal(second, here)
    assert upload([there], CPU) == [there]


def test_a_host_copy_keeps_what_was_written() -> None:
    packing = Packing(((4,), (2, 3)), (torch.int64, torch.int32))
    copy, buffer = HostCopy(packing, CPU), torch.full((packing.nbytes,), 7, dtype=torch.uint8)
    first, second = packing.views(buffer)
    copy.arrays()[0][:2] = 5
    copy.send(buffer)
    assert first.tolist() == [5, 5, 0, 0] and not second.any()
    copy.arrays()[1][:] = 9
    copy.send(buffer)
    assert first.tolist() == [5, 5, 0, 0] and second.unique().tolist() == [9]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1, 2], torch.int64), ([0.5, float("inf")], torch.float32), ([True], torch.bool)],
)
def test_send_and_read(values: list[float], dtype: torch.dtype) -> None:
    sent = send(values, dtype, CPU)
    assert torch.equal(sent, torch.tensor(values, dtype=dtype))
    assert read(sent) == values


def test_reading_calls_what_is_to_be_launched_meanwhile() -> None:
    called = []
    assert read(torch.arange(3), lambda: called.append(1)) == [0, 1, 2]
    assert called == [1]
