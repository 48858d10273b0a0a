"""The contract between graph and engine: sizes, names, order, and what a step may hold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.manifests import sample_spec

from smelt.runtime.batch import (
    Batch,
    BatchLayout,
    CacheSpec,
    ContractError,
    no_tree,
    step_input_names,
)
from smelt.runtime.length_scaling import LengthScaling

LAYOUT = BatchLayout(max_tokens=8, max_sequences=3, max_blocks=4, max_rows=5, max_position=64)


def batch(**changes: Any) -> Batch:
    """Two sequences, of 3 and 2 new tokens, in two cache groups."""
    values: dict[str, Any] = {
        "input_ids": torch.zeros(5, dtype=torch.int64),
        "position_ids": torch.tensor([0, 1, 2, 7, 8]),
        "query_start": torch.tensor([0, 3, 5], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 9], dtype=torch.int32),
        "slot_mapping": [torch.zeros(5, dtype=torch.int64)] * 2,
        "block_tables": [torch.zeros(2, 1, dtype=torch.int32)] * 2,
        "logits_rows": torch.tensor([2, 4]),
        "tree_mask": no_tree(5),
    }
    return Batch(**{**values, **changes})


def test_a_batch_within_its_limits_passes() -> None:
    batch().check(LAYOUT, sample_spec())
    batch(logits_rows=torch.zeros(0, dtype=torch.int64)).check(LAYOUT, sample_spec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(9)}, "input_ids has 9 entries, the graph takes at most 8"),
        ({"seq_lens": torch.zeros(4)}, "seq_lens has 4 entries, the graph takes at most 3"),
        ({"logits_rows": torch.zeros(6)}, "logits_rows has 6 entries, the graph takes at most 5"),
        ({"block_tables": [torch.zeros(2, 1), torch.zeros(2, 5)]}, "block_tables has 5 entries"),
        ({"block_tables": [torch.zeros(2, 1)]}, "block_tables: expected 2 cache groups"),
        ({"slot_mapping": [torch.zeros(5)] * 3}, "expected 2 cache groups"),
        ({"position_ids": torch.zeros(4)}, "position_ids has 4 entries for 5 tokens"),
        ({"slot_mapping": [torch.zeros(5), torch.zeros(6)]}, "slot_mapping has 6 entries for 5"),
        (
            {"position_ids": torch.tensor([0, 1, 2, 3, 64])},
            "position_ids reach 64, the model's context ends at 64",
        ),
    ],
)
def test_a_batch_beyond_a_limit_names_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        batch(**change).check(LAYOUT, sample_spec())


def test_the_order_of_a_steps_inputs() -> None:
    assert step_input_names(sample_spec()) == [
        "input_ids",
        "position_ids",
        "query_start",
        "seq_lens",
        "tree_mask",
        "slot_mapping_0",
        "block_tables_0",
        "slot_mapping_1",
        "block_tables_1",
        "logits_rows",
        "kv_cache_0",
        "kv_cache_1",
        "kv_cache_2",
    ]


def test_a_batchs_tensors_are_in_that_order() -> None:
    slots = [torch.full((5,), 1), torch.full((5,), 2)]
    tables = [torch.full((2, 1), 3), torch.full((2, 1), 4)]
    one = batch(slot_mapping=slots, block_tables=tables)
    found = dict(zip(step_input_names(sample_spec()), one.tensors(), strict=False))
    assert len(one.tensors()) == 10
    assert found["slot_mapping_1"] is slots[1] and found["block_tables_0"] is tables[0]
    assert found["logits_rows"] is one.logits_rows and found["seq_lens"] is one.seq_lens


def test_lengths_for_rotary_factors_are_an_input_only_where_they_matter() -> None:
    plain = sample_spec()
    spec = replace(plain, rope=LengthScaling("longrope", 32))
    assert CacheSpec.from_json(spec.to_json()) == spec
    assert CacheSpec.from_json(plain.to_json()) == plain and "rope" not in plain.to_json()
    assert step_input_names(spec).index("rope_lens") == 5
    assert [n for n in step_input_names(spec) if n != "rope_lens"] == step_input_names(plain)
    lengths = torch.full((5,), 9)
    one = batch(rope_lens=lengths)
    one.check(LAYOUT, spec)
    assert one.tensors()[5] is lengths
    with pytest.raises(ContractError, match="rope_lens: the graph does not take the lengths"):
        one.check(LAYOUT, plain)
    with pytest.raises(ContractError, match="rope_lens has 4 entries for 5 tokens"):
        batch(rope_lens=lengths[:4]).check(LAYOUT, spec)


def test_caches_are_allocated_a_layer_each() -> None:
    spec = sample_spec()
    caches = spec.allocate(5)
    shapes = [(5, 2, 16, 2, 64), (5, 2, 16, 2, 32), (5, 2, 16, 4, 64)]
    assert [tuple(cache.shape) for cache in caches] == shapes
    assert all(cache.dtype == torch.bfloat16 and not cache.any() for cache in caches)
    bytes_a_block = sum(cache[0].nbytes for cache in caches)
    assert spec.bytes_per_token() * spec.block_size == bytes_a_block


@pytest.mark.parametrize(
    ("name", "widths"), [("int8", (68, 36)), ("int4", (36, 20)), ("fp8", (66, 34))]
)
def test_quantized_caches_are_bytes_with_their_scales(name: str, widths: tuple[int, int]) -> None:
    spec = replace(sample_spec(), dtype="uint8", format=name)
    caches = spec.allocate(5)
    wide, narrow = widths
    shapes = [(5, 2, 16, 2, wide), (5, 2, 16, 2, narrow), (5, 2, 16, 4, wide)]
    assert [tuple(cache.shape) for cache in caches] == shapes == spec.shapes(5)
    assert all(cache.dtype == torch.uint8 for cache in caches)
    assert spec.bytes_per_token() * spec.block_size == sum(cache[0].nbytes for cache in caches)


@pytest.mark.parametrize(
    ("dtype", "name", "message"),
    [
        ("uint8", "int3", "cache format 'int3' is not known; known: auto, fp8, int8, int4"),
        ("bfloat16", "int8", "a cache of format int8 cannot hold bfloat16"),
        ("uint8", "auto", "a cache of format auto cannot hold uint8"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(dtype: str, name: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        replace(sample_spec(), dtype=dtype, format=name)


@pytest.mark.parametrize("name", ["auto", "int4"])
def test_specification_and_layout_survive_json(name: str) -> None:
    dtype = "bfloat16" if name == "auto" else "uint8"
    spec = replace(sample_spec(), dtype=dtype, format=name)
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert BatchLayout.from_json(json.loads(json.dumps(LAYOUT.to_json()))) == LAYOUT
    assert replace(LAYOUT, max_rows=6) != LAYOUT


@pytest.mark.parametrize(
    "field", ["block_size", "dtype", "heads", "head_sizes", "groups", "format"]
)
def test_a_specification_without_a_field_names_it(field: str) -> None:
    data = sample_spec().to_json()
    del data[field]
    with pytest.raises(ContractError, match=f"cache specification lacks {field}"):
        CacheSpec.from_json(data)


def test_a_layout_without_fields_names_them() -> None:
    with pytest.raises(ContractError, match="batch layout lacks max_rows, max_position"):
        BatchLayout.from_json({"max_tokens": 1, "max_sequences": 1, "max_blocks": 1})
