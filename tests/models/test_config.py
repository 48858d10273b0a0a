"""Configurations: which models are taken, and how one is made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import FAMILIES, tiny_config

from smelt.models.config import eos_ids, load_config, max_positions, shrink
from smelt.runtime.errors import UserError


def folder(path: Path, config: dict[str, Any] | str) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    return path


def refused(path: Path, config: dict[str, Any] | str, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(folder(path, config), **options)
    assert "\n" not in str(caught.value)


def test_a_causal_language_model_is_taken(tmp_path: Path) -> None:
    tiny_config("qwen2", hidden_size=64).save_pretrained(tmp_path)
    assert load_config(tmp_path).hidden_size == 64


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text, "config.json")


def test_an_unknown_model_type(tmp_path: Path) -> None:
    refused(tmp_path, {"model_type": "nonesuch"}, "config.json: .*nonesuch")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "has no causal language model"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM is not a causal language model",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not a causal language model",
        ),
    ],
)
def test_other_architectures_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(tmp_path, config, message)


def test_a_quantized_checkpoint_has_the_configuration_of_the_plain_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not hasattr(load_config(tmp_path), "quantization_config")


def test_an_unknown_quantization_is_refused_with_its_method(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}
    refused(tmp_path, config, r"quantized with aqlm; smelt reads awq, gptq")


CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
OWN = """
from pathlib import Path
from transformers import LlamaConfig
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


def test_code_in_the_folder_does_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    refused(
        tmp_path, CODE, r"brings its own Python code \(own.OwnConfig\); read it, then pass --tr"
    )
    assert not (tmp_path / "ran").exists()


def test_a_known_class_with_remote_code_beside_it_uses_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    path = folder(tmp_path, {**CODE, "model_type": "llama"})
    assert type(load_config(path)).__name__ == "LlamaConfig"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("family", "length"), [("gpt2", 1024), ("qwen3", 32768)])
def test_the_context_length(family: str, length: int) -> None:
    assert max_positions(tiny_config(family)) == length


def test_ends_of_sequence() -> None:
    config = tiny_config("llama", eos_token_id=7)
    assert eos_ids(config, {}) == [7]
    assert eos_ids(config, {"eos_token_id": [3, 4]}) == [3, 4]
    assert eos_ids(config, {"eos_token_id": 5}) == [5]
    assert eos_ids(tiny_config("llama", eos_token_id=None), {}) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_configuration_keeps_what_decides_the_structure(family: str) -> None:
    config = tiny_config(family)
    small = shrink(config)
    assert type(small) is type(config)
    assert small.num_hidden_layers <= 6 and small.vocab_size <= 512
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        pattern = getattr(config, name, None)
        if isinstance(pattern, list):
            cut = getattr(small, name)
            assert len(cut) == small.num_hidden_layers
            assert set(cut) == set(pattern), f"{name} lost a kind of layer"
    for name in ("tie_word_embeddings", "hidden_act", "attention_bias", "final_logit_softcapping"):
        assert getattr(small, name, None) == getattr(config, name, None)


def test_heads_keep_their_kind() -> None:
    def heads(query: int, key: int) -> tuple[int, int]:
        config = tiny_config("llama", num_attention_heads=query, num_key_value_heads=key)
        small = shrink(config)
        return small.num_attention_heads, small.num_key_value_heads

    assert heads(32, 32) == (4, 4)
    assert heads(32, 8) == (4, 2)
    assert heads(32, 1) == (4, 1)


def test_the_original_is_not_changed() -> None:
    config = tiny_config("gemma3_text")
    before = config.to_dict()
    shrink(config)
    assert config.to_dict() == before


def test_real_configurations_are_read(data: Any, tmp_path: Path) -> None:
    files = sorted(data("configs").glob("*.json"))
    assert files
    for file in files:
        raw = json.loads(file.read_text())
        if "text_config" in raw:
            refused(tmp_path, raw, "multimodal; smelt compiles text-only models")
        elif raw["model_type"] == "phi4":
            refused(tmp_path, raw, "brings its own Python code")
        else:
            assert max_positions(load_config(folder(tmp_path, raw))) > 0, file.name
