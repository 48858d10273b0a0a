"""The README's commands, run as a user runs them, on the shipped model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.artifacts import DEMO, ROOT, one_line, smelt

QUESTION = "What is 12 + 5?"


def test_generate_prints_one_json_object(awq: Path) -> None:
    out = json.loads(smelt("generate", awq, "Hello", "-n", "8", "--json").stdout)["outputs"][0]
    keys = {"text", "token_ids", "prompt_tokens", "finish_reason", "ttft_s", "decode_tokens_per_s"}
    assert keys <= set(out)
    assert 1 <= len(out["token_ids"]) <= 8


def test_generate_reads_prompts_from_stdin(awq: Path) -> None:
    done = smelt("generate", awq, "-n", "4", "--json", stdin="Hello\nGood morning\n")
    assert len(json.loads(done.stdout)["outputs"]) == 2


def test_greedy_tokens_equal_transformers(fp32: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["Hello! How are you?", "Spell the word cat.", "What is 3 + 4?", "Once"]
    done = smelt("generate", fp32, *prompts, "-n", "24", "--json")
    outputs = json.loads(done.stdout)["outputs"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert output["token_ids"] == expected.tolist(), prompt


def test_inspect_tells_what_each_pass_did(awq: Path) -> None:
    data = json.loads(smelt("inspect", awq, "--json").stdout)
    assert {"model", "quant", "target", "files", "passes"} <= set(data)
    keys = {"name", "matched", "expected", "rewritten", "declined", "ms"}
    for record in data["passes"]:
        assert keys | {"nodes_before", "nodes_after"} <= set(record)
        if record["expected"] is not None:
            assert record["matched"] >= record["expected"], record["name"]
    assert "quantize-awq" in smelt("inspect", awq, "--passes").stdout


def test_inspect_joins_each_layers_error_and_kernel(awq: Path) -> None:
    data = json.loads(smelt("inspect", awq, "--json").stdout)
    layers = {row["layer"]: row for row in data["layers"]}
    assert len(layers) == 4 * 5 + 1  # q+k+v, o, gate+up and down of five layers, and the head
    first = layers["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    assert (first["format"], first["operator"], first["provider"]) == ("int4", "linear_int4", "cpu")
    assert 0 < first["error"] <= first["error_rtn"]
    assert layers["lm_head"]["format"] == "16 bit" and "tied" in layers["lm_head"]["note"]
    shown = smelt("inspect", awq).stdout
    assert "model.layers.*.mlp.down_proj (5)" in shown and "model.layers.3" not in shown
    assert "model.layers.3.mlp.down_proj" in smelt("inspect", awq, "--layers").stdout


def test_eval_against_the_original(awq: Path) -> None:
    text = ROOT / "models" / "demo" / "heldout.txt"
    arguments = ("--text", text, "--against", DEMO, "--max-tokens", "2000", "--json")
    data = json.loads(smelt("eval", awq, *arguments).stdout)
    assert data["tokens"] > 1000
    assert 1 < data["perplexity"] < 1.5 * data["perplexity_original"]
    assert 0 < data["kl"] < 0.5
    assert 0.7 < data["top1_agreement"] <= 1


def test_bench_prints_its_numbers(awq: Path) -> None:
    arguments = ("--prompt", "16", "--gen", "8", "--rounds", "1", "--json")
    data = json.loads(smelt("bench", awq, *arguments).stdout)
    keys = {
        *("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "load_s", "peak_rss_bytes"),
        *("weight_bytes_per_token", "read_bandwidth_bytes_per_s", "bound_fraction"),
    }
    assert keys <= set(data)
    assert all(data[key] > 0 for key in keys)


def test_chat_keeps_the_cache_of_earlier_turns(awq: Path) -> None:
    done = smelt("chat", awq, stdin=f"{QUESTION}\nHello!\n/stats\n/exit\n")
    assert "reused" in done.stdout
    assert one_answer(done.stdout)


def one_answer(text: str) -> bool:
    return any(character.isalnum() for character in text)


def test_trace_and_plan_need_no_compilation() -> None:
    traced = json.loads(smelt("trace", DEMO, "--check", "--json").stdout)
    assert traced["max_difference"] <= 1e-4
    assert traced["attention"] == traced["layers_traced"]
    plan = json.loads(smelt("plan", DEMO, "--ctx", "512", "--json").stdout)
    parts = plan["weights_bytes"] + plan["kv_bytes"] + plan["activation_bytes"]
    assert plan["total_bytes"] == parts


def test_the_library_does_what_the_commands_do(awq: Path) -> None:
    import smelt as library

    with library.load(awq) as llm:
        outputs = llm.generate(["Hello"], library.SamplingParams(max_tokens=8))
        pieces = "".join(llm.stream("Hello", library.SamplingParams(max_tokens=8)))
        logits = llm.logits([[1, 2, 3], [4, 5]])
    assert pieces == outputs[0].text
    assert [len(x) for x in logits] == [3, 2]
    assert all(x.dtype == torch.float32 for x in logits)


def test_running_an_artifact_imports_no_compiler(awq: Path) -> None:
    program = (
        "import sys, smelt\n"
        f"llm = smelt.load({str(awq)!r})\n"
        "llm.generate(['Hello'], smelt.SamplingParams(max_tokens=2))\n"
        "bad = [m for m in sys.modules if m.startswith(\n"
        "    ('torch._inductor', 'smelt.compiler', 'smelt.passes', 'transformers'))]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compile", "no/such/folder", "-o", "OUT"), "no folder"),
        (("compile", str(DEMO), "-o", "OUT", "--quant", "gguf"), "gguf"),
        (("compile", str(DEMO), "-o", "OUT", "--kv-cache", "int3"), "auto, fp8, int8, int4"),
        (("compile", str(DEMO), "-o", "OUT", "--opt", "O7"), "O7"),
        (("compile", str(DEMO), "-o", "OUT", "--skip", "no-such-pass"), "no-such-pass"),
        (("generate", "OUT", "x"), "OUT"),
        (("inspect", str(DEMO)), "not an artifact"),
    ],
)
def test_the_users_mistakes_are_one_line(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    given = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    says = says.replace("OUT", str(tmp_path / "out"))
    done = smelt(*given, code=2)
    assert says in one_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
