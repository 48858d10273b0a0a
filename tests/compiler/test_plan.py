"""Memory plans: pinned sizes of known models, quantized layers counted by hand, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smelt.compiler.plan import plan
from smelt.runtime.errors import UserError

GIB = 2**30
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
TINY = {
    **LLAMA_7B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def compressed(kind: str, strategy: str) -> dict[str, Any]:
    """A compressed-tensors configuration of 8-bit weights and dynamic inputs."""
    form = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**form, "strategy": "channel"},
        "input_activations": {**form, "strategy": strategy, "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
    }


def write(folder: Path, config: dict[str, Any], name: str = "model.json") -> str:
    (folder / name).write_text(json.dumps(config))
    return str(folder / name)


def test_llama_2_7b(tmp_path: Path) -> None:
    found = plan(write(tmp_path, LLAMA_7B), ctx=4096)
    assert found.parameters == 6_738_415_616
    assert found.weights_bytes == 2 * found.parameters
    assert found.kv_bytes_per_token == 32 * 2 * 32 * 128 * 2
    assert found.kv_bytes == 2 * GIB
    # T x (2 hidden + gate, up and their product) x 2 bytes, and one row of logits twice.
    assert found.activation_bytes == 2048 * (2 * 4096 + 3 * 11008) * 2 + 32000 * 6
    parts = found.weights_bytes + found.kv_bytes + found.activation_bytes
    assert found.total_bytes == parts
    assert found.fits == (parts <= found.memory_available_bytes)


@pytest.mark.parametrize(
    ("name", "ratio"), [("auto", 1.0), ("int8", 1.94), ("int4", 3.76), ("fp8", 1.97)]
)
def test_a_quantized_cache_counts_its_scales(tmp_path: Path, name: str, ratio: float) -> None:
    path = write(tmp_path, LLAMA_7B)
    found, plain = plan(path, ctx=4096, kv_cache=name), plan(path, ctx=4096)
    assert found.kv_cache == name
    assert round(plain.kv_bytes_per_token / found.kv_bytes_per_token, 2) == ratio
    assert found.kv_bytes == 4096 * found.kv_bytes_per_token
    assert plain.total_bytes - found.total_bytes == plain.kv_bytes - found.kv_bytes


@pytest.mark.parametrize(("batch", "rows"), [(1, 16), (16, 16), (17, 48), (64, 112), (300, 496)])
def test_graphs_count_on_a_gpu_alone(tmp_path: Path, batch: int, rows: int) -> None:
    path = write(tmp_path, LLAMA_7B)
    plain, found = plan(path, batch=batch), plan(path, batch=batch, device="cuda")
    assert plain.graph_bytes == 0
    # A table of 256 blocks for each of 256 sequences; the other inputs are small beside it.
    inputs = found.graph_bytes - rows * 32000 * 2
    assert 256 * 256 * 4 < inputs < 256 * 256 * 4 + 32 * 1024
    assert found.total_bytes - plain.total_bytes == found.graph_bytes


def test_an_unknown_cache_format_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--kv-cache int3: expected one of auto, fp8, int8, int4"):
        plan(write(tmp_path, LLAMA_7B), kv_cache="int3")


def test_llama_2_70b_has_eight_key_value_heads(tmp_path: Path) -> None:
    config = {
        **LLAMA_7B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    path = write(tmp_path, config)
    found = plan(path, ctx=4096)
    assert found.kv_bytes == 1.25 * GIB
    assert found.parameters == 68_976_648_192
    assert plan(path, ctx=4096, batch=3).kv_bytes == 3.75 * GIB


def test_quantized_weights(tmp_path: Path) -> None:
    path = write(tmp_path, TINY)
    plain = plan(path)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    rest = plain.parameters - linears  # embeddings, head and norms stay in 16 bit
    rows = 2 * (64 * 2 + 32 * 2 + 2 * 128 + 64)
    int8 = plan(path, quant="rtn", format="int8")
    assert int8.weights_bytes == 2 * rest + linears + 2 * rows
    groups = 2 * (64 * 2 * 2 + 32 * 2 * 2 + 2 * 128 * 2 + 64 * 4)
    eights: list[dict[str, Any]] = [
        {"quant": "smoothquant", "alpha": 0.5},
        {"quant": "fp8", "activations": "static"},
        {"quant": "rtn", "format": "fp8"},
    ]
    for options in eights:  # float32 scales
        assert plan(path, **options).weights_bytes == 2 * rest + linears + 4 * rows
    blocks = plan(path, quant="fp8", group_size=128)
    assert blocks.weights_bytes == 2 * rest + linears + 4 * 2 * 7
    int4 = plan(path, quant="awq", group_size=32)
    assert int4.weights_bytes == 2 * rest + linears // 2 + 3 * groups
    assert int4.weights_unquantized_bytes == plain.weights_bytes
    assert plan(path, dtype="fp32").weights_bytes == 2 * plain.weights_bytes


def test_experts_count_matrix_by_matrix(tmp_path: Path) -> None:
    mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    path = write(tmp_path, {**TINY, **mixtral, "num_local_experts": 4})
    plain = plan(path)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    experts = 2 * 4 * 3 * 64 * 128
    rest = plain.parameters - linears - experts
    rows = 2 * (64 * 2 + 32 * 2)
    expert_rows = 2 * 4 * (2 * 128 + 64)
    int8 = plan(path, quant="rtn", format="int8")
    assert int8.weights_bytes == 2 * rest + linears + experts + 2 * (rows + expert_rows)
    # Linears of smoothquant have float32 scales; experts are int8 without activations.
    w8a8 = plan(path, quant="smoothquant", alpha=0.5)
    assert w8a8.weights_bytes == 2 * rest + linears + experts + 4 * rows + 2 * expert_rows
    groups = 2 * (64 * 2 * 2 + 32 * 2 * 2) + 2 * 4 * (2 * 128 * 2 + 64 * 4)
    int4 = plan(path, quant="awq", group_size=32)
    assert int4.weights_bytes == 2 * rest + (linears + experts) // 2 + 3 * groups
    assert not int4.notes
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    kept = plan(write(tmp_path, {**TINY, **mixtral, "num_local_experts": 4, **stored}))
    assert kept.weights_bytes == int4.weights_bytes
    assert not any("experts" in note for note in kept.notes)
    asymmetric = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False}
    sizes = {"num_local_experts": 4, "quantization_config": asymmetric}
    kept = plan(write(tmp_path, {**TINY, **mixtral, **sizes}))
    assert "experts count as float16: dequantized" in kept.notes
    assert kept.weights_bytes == plain.weights_bytes


def test_a_quantized_checkpoint_counts_as_it_is(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    model = write(tmp_path, {**LLAMA_7B, "quantization_config": config})
    found = plan(model)
    assert found.weights_bytes == plan(write(tmp_path, LLAMA_7B), quant="rtn").weights_bytes
    assert found.quant == "gptq int4 g128" and "compiled as it is" in found.notes[0]
    with pytest.raises(UserError, match=r"already quantized \(gptq int4 g128\)"):
        plan(write(tmp_path, {**LLAMA_7B, "quantization_config": config}), quant="rtn")


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"group_size": 128}),
        ({"quant_method": "fp8"}, {}),
        (compressed("int", "token"), {"quant": "smoothquant", "alpha": 0.0}),
        (compressed("float", "token"), {}),
    ],
    ids=["fp8-blocks", "fp8", "w8a8", "compressed-fp8"],
)
def test_8_bit_checkpoints_keep_their_weights(
    tmp_path: Path, config: dict[str, Any], same: dict[str, Any]
) -> None:
    ours = plan(write(tmp_path, LLAMA_7B), **{"quant": "fp8", **same})
    found = plan(write(tmp_path, {**LLAMA_7B, "quantization_config": config}))
    assert found.weights_bytes == ours.weights_bytes
    assert {kind.operator for kind in found.layers} == {kind.operator for kind in ours.layers}


def test_what_no_operator_keeps_counts_dequantized(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    found = plan(write(tmp_path, {**LLAMA_7B, "quantization_config": config}))
    assert found.weights_bytes == found.weights_unquantized_bytes


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    untied = plan(write(tmp_path, TINY))
    tied = plan(write(tmp_path, {**TINY, "tie_word_embeddings": True}))
    assert untied.weights_bytes - tied.weights_bytes == 100 * 64 * 2


def test_sliding_windows_bound_the_cache(tmp_path: Path) -> None:
    config = {
        **TINY,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 256,
    }
    found = plan(write(tmp_path, config), ctx=4096)
    assert found.kv_bytes == 256 * found.kv_bytes_per_token
    assert "sliding window" in found.notes[0]
    assert plan(write(tmp_path, config), ctx=100).kv_bytes == 112 * found.kv_bytes_per_token


def test_an_architecture_overrules_a_wrong_model_type(tmp_path: Path) -> None:
    found = plan(write(tmp_path, {**TINY, "model_type": "llama-converted"}))
    assert found.model_class == "LlamaForCausalLM"
    assert "read as llama" in found.notes[0]


def test_configurations_of_real_models(data: Callable[[str], Path]) -> None:
    sizes = {
        "Llama-3.2-1B-Instruct": 1_235_814_400,
        "meta-llama--Llama-3.1-8B": 8_030_261_248,
        "Qwen2.5-0.5B-Instruct": 494_032_768,
        "gemma3_1b_it": 999_885_952,
        "mistralai--Mixtral-8x7B-v0.1": 46_702_792_704,
    }
    for name, parameters in sizes.items():
        found = plan(str(data(f"configs/{name}.json")), quant="awq")
        assert found.parameters == parameters, name
        assert found.weights_bytes < found.weights_unquantized_bytes, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": "awq", "format": "int8"}, "use rtn with int8"),
        ({"quant": "mixed", "bits": 2.0}, "from 2.75 bits"),
        ({"quant": "rtn", "bits": 4.5}, "rtn takes --format"),
        ({"quant": "rtn", "group_size": 7}, "multiple of 8"),
        ({"quant": "smoothquant", "format": "int4"}, "leave --format out"),
        ({"quant": "smoothquant", "group_size": 64}, "use rtn with int8 for groups"),
        ({"quant": "smoothquant", "alpha": 1.5}, "from 0"),
        ({"quant": "fp8", "group_size": 64}, "blocks of 128 x 128"),
        ({"quant": "fp8", "group_size": 128, "activations": "static"}, "use --activations dynamic"),
        ({"quant": "awq", "activations": "dynamic"}, "smoothquant .int8. and fp8 quantize them"),
        ({"quant": "awq", "alpha": 0.5}, "smoothquant's exponent"),
        ({"dtype": "fp8"}, "--dtype fp8"),
        ({"ctx": 5000}, "from 1 to 4096"),
        ({"batch": 0}, "--batch is 0"),
    ],
)
def test_what_does_not_work_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(write(tmp_path, TINY), **options)


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        plan(str(tmp_path / "absent"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json cannot be read"):
        plan(str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match=r"^\S*nothing\.json: ") as caught:
        plan(write(tmp_path, {"a": 1}, "nothing.json"))
    assert "smelt-plan-" not in str(caught.value)
    encoder = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    with pytest.raises(UserError, match="encoder-decoder"):
        plan(write(tmp_path, encoder))
