"""The tensors of a quantized checkpoint are checked before any is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.foreign import awq_tensors, gptq_tensors, integers
from safetensors.torch import save_file

from smelt.models.checkpoint import Checkpoint
from smelt.models.quantized import describe
from smelt.models.stored import StoredWeight, stored_weights
from smelt.runtime.errors import UserError

Tensors = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj"


def weight(n: int = 32, k: int = 64) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def read(folder: Path, tensors: Tensors, **config: object) -> StoredWeight:
    named = {f"{UP}.{leaf}": value for leaf, value in tensors.items()}
    plain = {"model.norm.weight": torch.ones(64)}
    save_file({**named, **plain}, folder / "model.safetensors")
    found = describe(json.loads(json.dumps({"quantization_config": config})), "here")
    assert found is not None
    stored = stored_weights(found, Checkpoint(folder), "here")
    assert list(stored) == [UP]
    return stored[UP]


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def test_a_linear_and_its_sizes(tmp_path: Path) -> None:
    found = read(tmp_path, awq_tensors(integers(weight())), **AWQ)
    assert (found.n, found.k, found.form.group, found.form.rows) == (32, 64, 32, 1)
    assert found.tensors == {
        "q": f"{UP}.qweight",
        "scales": f"{UP}.scales",
        "zeros": f"{UP}.qzeros",
    }


def test_the_order_of_features_is_told_apart(tmp_path: Path) -> None:
    orders = {
        None: np.arange(64) // 32,
        "groups": 1 - np.arange(64) // 32,
        "uneven": np.repeat([0, 1], [40, 24]),
    }
    for expected, order in orders.items():
        found = read(tmp_path, gptq_tensors(integers(weight(), order=order)), **GPTQ)
        assert found.order == expected
        assert ("order" in found.tensors) == (expected is not None)
    shuffled = [np.random.default_rng(seed).permutation(orders[None]) for seed in (0, 0, 1)]
    digests = [
        read(tmp_path, gptq_tensors(integers(weight(), order=order)), **GPTQ).order
        for order in shuffled
    ]
    assert digests[0] == digests[1] != digests[2]


def drop(leaf: str) -> Callable[[Tensors], None]:
    return lambda tensors: void(tensors.pop(leaf))


def cut(leaf: str, rows: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[leaf] = tensors[leaf][:rows].contiguous()

    return change


def cast(leaf: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[leaf] = tensors[leaf].to(dtype)

    return change


def void(_: object) -> None:
    return None


BAD = [
    (AWQ, drop("scales"), rf"its tensor {UP}.scales is missing; is the checkpoint complete"),
    (AWQ, drop("qzeros"), rf"its tensor {UP}.qzeros is missing"),
    (AWQ, cut("qzeros", 1), rf"{UP}.qzeros is int32 \[1, 4\], expected \[2, 4\]"),
    (AWQ, cut("qweight", 16), "scales is bfloat16 .2, 32., expected .1, 32. for 16 features"),
    (AWQ, cast("qweight", torch.int64), "qweight is int64 .64, 4., expected int32 in 2 dimensions"),
    (AWQ, cast("scales", torch.int32), "scales is int32 .2, 32., expected float16 or"),
    ({**AWQ, "group_size": 16}, void, "expected .4, 32. for 64 features in groups of 16"),
    ({**AWQ, "group_size": 24}, void, "expected .3, 32. for 64 features in groups of 24"),
    ({**AWQ, "modules_to_not_convert": ["up_proj"]}, void, "lists .* among the modules left alone"),
]


@pytest.mark.parametrize(("config", "change", "message"), BAD, ids=range(len(BAD)))
def test_a_damaged_awq_linear_is_named(
    tmp_path: Path, config: dict[str, object], change: Callable[[Tensors], None], message: str
) -> None:
    tensors = awq_tensors(integers(weight()))
    change(tensors)
    with pytest.raises(UserError, match=message):
        read(tmp_path, tensors, **config)


def test_a_group_that_does_not_exist_is_named(tmp_path: Path) -> None:
    tensors = gptq_tensors(integers(weight()))
    tensors["g_idx"][3] = 7
    with pytest.raises(UserError, match=rf"{UP}.g_idx names group 7 .* there are 2"):
        read(tmp_path, tensors, **GPTQ)
    tensors["g_idx"] = tensors["g_idx"][:10].contiguous()
    with pytest.raises(UserError, match=rf"{UP}.g_idx is int32 \[10\], expected \[64\]"):
        read(tmp_path, tensors, **GPTQ)


def test_bits_that_differ_from_the_configuration_do_not_fit(tmp_path: Path) -> None:
    tensors = gptq_tensors(integers(weight(), bits=8), bits=8)
    with pytest.raises(UserError, match=rf"{UP}\..* expected"):
        read(tmp_path, tensors, **GPTQ)
    found = read(tmp_path, tensors, **GPTQ, dynamic={"+:.*up_proj": {"bits": 8}})
    assert (found.form.bits, found.k) == (8, 64)


def test_packed_weights_agree_with_their_shape(tmp_path: Path) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            }
        },
    }
    tensors = {
        "weight_packed": torch.zeros(32, 8, dtype=torch.int32),
        "weight_scale": torch.ones(32, 2),
        "weight_shape": torch.tensor([32, 64]),
    }
    assert read(tmp_path, dict(tensors), **config).k == 64
    tensors["weight_shape"] = torch.tensor([32, 80])
    with pytest.raises(UserError, match=r"weight_shape is \[32, 80\]"):
        read(tmp_path, tensors, **config)


def test_a_plain_checkpoint_under_a_quantized_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="announces awq weights, and the checkpoint has no"):
        read(tmp_path, {"weight": weight()}, **AWQ)
