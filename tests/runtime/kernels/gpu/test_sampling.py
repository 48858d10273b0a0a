"""Top-k and top-p by bisection keep the tokens that sorting keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.guarded import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime import filters
from smelt.runtime.filters import NO_VALUE, probabilities
from smelt.runtime.kernels.gpu import sampling
from smelt.runtime.kernels.gpu.sampling import candidates, cost, filter_top, pays
from smelt.runtime.sampling_params import SamplingParams

KINDS = ("normal", "peaked", "flat", "ties", "constant", "masked", "few", "wide", "near")


def sample_row(kind: str, size: int, make: torch.Generator) -> torch.Tensor:
    """float32 [size]; any two values are equal or differ by enough to have other probabilities,
    except in "near", where differences vanish in them."""
    x = torch.randn(size, generator=make)
    if kind == "peaked":
        return x * 8
    if kind == "flat":
        return x * 0.2
    if kind == "ties":
        return (x * 2).round() / 2 * torch.tensor([1.0, -1.0])[torch.arange(size) % 2]
    if kind == "constant":
        return torch.full((size,), -0.0) if size % 2 else torch.full((size,), 7.25)
    if kind == "masked":
        return x.masked_fill(torch.rand(size, generator=make) < 0.7, NO_VALUE)
    if kind == "few":
        row = torch.full((size,), NO_VALUE)
        row[size // 2] = 3.0
        row[-1] = x[0]
        return row
    if kind == "wide":
        return x * 1e30
    if kind == "near":
        return x * 1e-9
    return x * 3


def nucleus(row: torch.Tensor, top_k: int, top_p: float) -> float:
    """A top_p near the wanted one that no rounding of a sum can touch: halfway between the sums of
    the most likely tokens of `row` that top_k leaves."""
    if top_p >= 1 or row.isinf().all():
        return top_p
    left = filters._top_k(row[None], [top_k])[0] if top_k else row
    probs = left.double().softmax(-1)
    sums = torch.cat((torch.zeros(1), probs.sort(descending=True).values.cumsum(0)))
    middle, gap = (sums[1:] + sums[:-1]) / 2, sums.diff()
    middle = middle[gap > 1e-5]
    return float(middle[(middle - top_p).abs().argmin()])


def expected(scores: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """By torch's sort, as filters.py does it on a device without the kernel."""
    scores = filters._top_k(scores, top_k) if any(top_k) else scores
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < filters._sorted_floors(probs, top_p), NO_VALUE)


def filter_rows(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """filter_top of a copy on DEVICE, with the same parameters for all rows."""
    rows = len(scores)
    copy = scores.to(DEVICE, copy=True)
    return filter_top(copy, [top_k] * rows, [top_p] * rows).cpu()


ROWS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.one_of(st.sampled_from([0, 0, 1, 2, 50, 200]), st.integers(0, 310)),
        st.one_of(st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-6]), st.floats(1e-3, 0.9999)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from([2, 5, 127, 128, 129, 300]), st.integers(0, 2**20))
def test_keeps_what_sorting_keeps(
    asked: list[tuple[str, int, float]], size: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    rows = [sample_row(kind, size, make) for kind, _, _ in asked]
    top_k = [k for _, k, _ in asked]
    top_p = [nucleus(row, k, p) for row, (_, k, p) in zip(rows, asked, strict=True)]
    # Rows of a wider tensor: what lies between them must neither be read nor written.
    wide = torch.full((len(rows), size + 3), float("nan"), device=DEVICE)
    wide[:, :size] = torch.stack(rows)
    want = expected(torch.stack(rows), top_k, top_p)
    found = filter_top(wide[:, :size], top_k, top_p)
    assert torch.equal(found.cpu(), want)
    assert found.data_ptr() == wide.data_ptr() and wide[:, size:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_row(kind: str) -> None:
    row = sample_row(kind, 300, torch.Generator().manual_seed(3))
    for top_k, top_p in ((3, 1.0), (140, 1.0), (0, 0.9), (300, 0.3), (40, 0.7), (140, 0.8)):
        p = nucleus(row, top_k, top_p)
        found = filter_rows(row[None], top_k, p)
        assert torch.equal(found, expected(row[None], [top_k], [p])), (top_k, top_p)


def test_ties_with_the_last_token_are_kept() -> None:
    row = torch.tensor([[2.0, 1.0, 1.0, -0.0, 0.0, 1.0, -1.0]])
    assert (filter_rows(row, 2, 1.0) > NO_VALUE).tolist() == [[1, 1, 1, 0, 0, 1, 0]]
    assert (filter_rows(row, 0, 0.5) > NO_VALUE).tolist() == [[1, 1, 1, 0, 0, 1, 0]]
    assert (filter_rows(row, 5, 1.0) > NO_VALUE).tolist() == [[1, 1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_distribution_stay_as_they_are(value: float) -> None:
    scores = torch.randn(4, 200)
    scores[1, 77] = value
    scores[2] = NO_VALUE
    found = filter_rows(scores, 3, 0.9)
    assert torch.equal(found[1:3].nan_to_num(9.0), scores[1:3].nan_to_num(9.0))
    assert ((found[[0, 3]] > NO_VALUE).sum(-1) <= 3).all()


@pytest.mark.parametrize("top_p", [1 - 2**-24, 1 - 2**-20, 1e-30])
def test_the_ends_of_top_p(top_p: float) -> None:
    """Where sums round to 1, everything may be kept; a sum that any token reaches keeps one."""
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(5)) * 4
    kept = filter_rows(row, 0, top_p)[0] > NO_VALUE
    probs = row[0].double().softmax(-1)
    assert probs[kept].sum() >= top_p - 1e-6
    assert kept.all() or probs[~kept].max() < probs[kept].min()
    assert probs[kept].sum() - probs[kept].min() < top_p + 1e-6


def test_probabilities_are_the_same_on_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(7)
    logits = torch.randn(4, 211, generator=make) * 3
    fields = ({"top_k": 20}, {"top_p": 0.9}, {}, {"top_k": 50, "top_p": 0.7, "min_p": 0.01})
    params = [SamplingParams(temperature=0.8, **values) for values in fields]
    want = probabilities(logits, params)
    calls, shapes = [], []

    def kernel(scores: torch.Tensor, *asked: list[float]) -> torch.Tensor:
        calls.append(asked)
        return filter_top(scores.to(DEVICE), *asked).to(scores.device)

    def choose(device: torch.device, *shape: int) -> object:
        shapes.append((device.type, *shape))
        return kernel

    monkeypatch.setattr(filters, "_kernel", choose)
    before = logits.clone()
    assert torch.equal(probabilities(logits, params), want)
    assert torch.equal(logits, before) and len(calls) == 1
    assert shapes == [("cpu", 4, 211)]
    probabilities(logits, [SamplingParams(temperature=1.0)] * 4)
    assert len(calls) == 1, "nothing to filter"


def test_the_cpu_path_loads_no_kernel() -> None:
    code = (
        "import sys, torch; from smelt.runtime.filters import probabilities as p;"
        "from smelt.runtime.sampling_params import SamplingParams as S;"
        "p(torch.randn(64, 1024), [S(temperature=1.0, top_k=5, top_p=0.9)] * 64);"
        "assert not any(m.startswith('smelt.runtime.kernels') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_where_it_pays() -> None:
    assert pays(1, 32000) and pays(1, 151936) and pays(256, 256000) and pays(64, 1 << 20)
    assert not pays(1, 2048) and not pays(2, 1 << 20)


def test_other_dtypes_are_refused_and_columns_copied() -> None:
    with pytest.raises(ValueError, match="not float32"):
        filter_top(torch.zeros(1, 4, dtype=torch.float16), [1], [1.0])
    columns = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]], device=DEVICE).t()
    found = filter_top(columns, [1, 2], [1.0, 1.0])
    assert (found > NO_VALUE).tolist() == [[True, False, False], [False, True, True]]


def test_cost_and_candidates() -> None:
    assert cost(64, 128256).bytes == 64 * 128256 * 8
    tried = candidates("rows", 90)
    assert 4 <= len(tried) <= 10 and len({str(config) for config in tried}) == len(tried)
    assert tried[0] == sampling.choose("sampling", ["rows"], 90)
