"""`smelt export`: transformers loads the folder and says what the artifact says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.artifacts import DEMO, one_line
from helpers.artifacts import smelt as command
from helpers.quantized import module
from safetensors.torch import load_file

import smelt
from smelt.runtime.errors import SmeltError, UserError

IDS = torch.arange(3, 27) * 5 % 128
PROMPTS = ["Once upon a time", "The sum of 12 and 30 is"]
LENGTH = 16
END = 4  # the demo model's end of an answer, after which it is free to say anything


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32 with AWQ: folded norms, fused linears, tied embeddings."""
    out = tmp_path_factory.mktemp("export") / "demo"
    options = {"calib_samples": 4, "calib_seqlen": 128, "dtype": "fp32", "backend": "eager"}
    smelt.compile(DEMO, out, quant="awq", group_size=32, **options)
    return out


@pytest.fixture(scope="module")
def said(demo: Path) -> list[list[int]]:
    return greedy(demo)


def greedy(artifact: Path, prompts: list[str] = PROMPTS) -> list[list[int]]:
    """Greedy tokens of the artifact."""
    llm = smelt.load(artifact, kv_cache_tokens=512)
    params = smelt.SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts, params)]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("format", ["compressed-tensors", "hf"])
def test_the_demo_model_says_the_same(
    demo: Path, said: list[list[int]], tmp_path: Path, format: str
) -> None:
    out = tmp_path / "folder"
    command("export", demo, "-o", out, "--format", format)
    assert transformers_greedy(out) == said


def transformers_greedy(folder: Path, prompts: list[str] = PROMPTS) -> list[list[int]]:
    """Greedy tokens of a folder as transformers loads it."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), loaded(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            for _ in range(LENGTH):  # generate() would keep end tokens out to reach a length
                best = model(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, best], 1)
        found.append(ids[0, length:].tolist())
    return found


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("int-quantized", {"quant": "smoothquant", "alpha": 0.0}),
        ("float-quantized", {"quant": "fp8"}),
        ("float-quantized", {"quant": "fp8", "group_size": 128}),
        ("naive-quantized", {"quant": "rtn", "format": "fp8"}),
    ],
)
def test_8_bits_that_round_inputs_too(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    smelt.compile(DEMO, tmp_path / "out", dtype="fp32", backend="eager", **options)
    done = smelt.export(tmp_path / "out", tmp_path / "folder")
    assert done.quantized >= 7 and done.notes == ()
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    assert config["format"] == layout and "dequantize" not in config
    # compressed-tensors rounds int8 inputs with max|x| / 127.5, smelt with max|x| / 127: the model
    # must be sure of its answer for both to give it, as it is of what it was taught.
    prompts = [f"<|user|>{text}<|end|><|assistant|>" for text in ("47+62", "What is 5 + 35?")]
    ours = greedy(tmp_path / "out", prompts)
    theirs = transformers_greedy(tmp_path / "folder", prompts)
    assert [answer[: answer.index(END)] for answer in theirs] == [
        answer[: answer.index(END)] for answer in ours
    ]


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": kind, "dynamic": False, "strategy": "tensor"}
    foreign.compressed(
        tmp_path / "model", weights=weights, activations=inputs, input_scale=lambda name: 0.03
    )
    smelt.compile(tmp_path / "model", tmp_path / "out", backend="eager", dtype="fp32")
    smelt.export(tmp_path / "out", tmp_path / "folder")
    given = load_file(tmp_path / "model" / "model.safetensors")
    back = load_file(tmp_path / "folder" / "model.safetensors")
    assert set(back) == set(given) and any(name.endswith("input_scale") for name in back)
    for name, value in given.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name
    raw = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("model", "folder")]
    first, second = (r["quantization_config"]["config_groups"]["group_0"] for r in raw)
    for part in ("weights", "input_activations"):
        assert second[part].items() <= first[part].items()


def test_3_bits_go_back_as_plain_weights_only(tmp_path: Path) -> None:
    model = module("Llama")
    options: dict[str, Any] = {"quant": "rtn", "format": "int3", "group_size": 32}
    smelt.compile(model, tmp_path / "out", backend="eager", **options)
    with pytest.raises(UserError, match=r"compressed-tensors can hold .*3 bits"):
        smelt.export(tmp_path / "out", tmp_path / "ct")
    assert smelt.export(tmp_path / "out", tmp_path / "hf", format="hf").plain == 15
    with torch.no_grad():
        found, original = (m(IDS[None]).logits for m in (loaded(tmp_path / "hf"), model))
    assert 0 < (found - original).abs().max() < 0.5 * original.abs().max()


def test_the_demo_folder_holds_packed_integers_under_the_modules_names(
    demo: Path, tmp_path: Path
) -> None:
    done = smelt.export(demo, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    packed = [name for name in tensors if name.endswith("q_proj.weight_packed")]
    assert len(packed) == config["num_hidden_layers"] and done.quantized >= 7 * len(packed)
    assert tensors[packed[0]].dtype == torch.int32
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = smelt.compile(tmp_path / "out", tmp_path / "again", backend="eager", dtype="fp32")
    record = next(r for r in again.manifest.passes if r["name"] == "keep-quantized")
    assert record["rewritten"] == done.quantized


def test_int8_with_biases_is_loaded_compressed(tmp_path: Path) -> None:
    model = module("Qwen2")
    options: dict[str, Any] = {"quant": "rtn", "format": "int8", "backend": "eager"}
    smelt.compile(model, tmp_path / "out", **options)
    smelt.export(tmp_path / "out", tmp_path / "ct")
    smelt.export(tmp_path / "out", tmp_path / "hf", format="hf")
    raw = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert "dequantize" not in raw and raw["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    with torch.no_grad():
        ct, hf = (loaded(tmp_path / n)(IDS[None]).logits for n in ("ct", "hf"))
        original = model(IDS[None]).logits
    torch.testing.assert_close(ct, hf, atol=1e-5, rtol=1e-5)
    assert 0 < (hf - original).abs().max() < 0.05 * original.abs().max()


def test_features_out_of_order_come_back_in_order(tmp_path: Path) -> None:
    reference = foreign.gptq(tmp_path / "model", order="features")
    smelt.compile(tmp_path / "model", tmp_path / "out", backend="eager", dtype="fp32")
    done = smelt.export(tmp_path / "out", tmp_path / "hf", format="hf")
    assert done.quantized == 0
    with torch.no_grad():
        found, expected = (m(IDS[None]).logits for m in (loaded(tmp_path / "hf"), reference))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no weight that compressed-tensors can hold"):
        smelt.export(tmp_path / "out", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_what_cannot_be_exported_is_said_and_leaves_nothing(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    line = one_line(command("export", demo, "-o", tmp_path / "used", code=2).stderr)
    assert line == f"smelt: {tmp_path / 'used'} is in use; name a new folder"
    with pytest.raises(UserError, match="--format gguf: expected one of compressed-tensors, hf"):
        smelt.export(demo, tmp_path / "new", format="gguf")
    old = Path(shutil.copytree(demo, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "model.json").unlink()
    manifest["files"].pop("model.json")
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made by an older smelt; compile it again"):
        smelt.export(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_weight_of_unknown_origin_stops_the_export(demo: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(demo, tmp_path / "changed"))
    data = json.loads((changed / "model.json").read_text())
    data["origins"].pop("model.norm.weight")
    (changed / "model.json").write_text(json.dumps(data))
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["files"].pop("model.json")
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SmeltError, match=r"no weight of the artifact holds model.norm.weight"):
        smelt.export(changed, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed"]
