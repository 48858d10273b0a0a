"""`smelt plan`: the table, JSON with the agreed fields, and one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smelt.cli.app import main
from smelt.cli.plan import size

FIELDS = {
    "weights_bytes",
    "kv_bytes_per_token",
    "kv_bytes",
    "activation_bytes",
    "total_bytes",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.out if code == 0 else captured.err


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, str(folder), "--batch", "2", "--quant", "awq", "--json"))
    assert set(found) >= FIELDS
    assert found["ctx"] == 256
    assert found["kv_bytes"] == 2 * 256 * found["kv_bytes_per_token"]
    assert found["quant"] == "awq-int4-g128"
    lone = json.loads(run(capsys, str(folder / "config.json"), "--quant", "awq", "--json"))
    assert lone["weights_bytes"] == found["weights_bytes"]


def test_the_format_of_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, str(folder), "--kv-cache", "int8", "--json"))
    assert found["kv_cache"] == "int8" and found["kv_bytes_per_token"] == 2 * 2 * 2 * (16 + 4)
    assert "160 B a token, int8" in run(capsys, str(folder), "--kv-cache", "int8")
    assert "--kv-cache int5" in run(capsys, str(folder), "--kv-cache", "int5", code=2)


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, str(folder), "--ctx", "100")
    for word in ("weights", "KV cache", "activations", "total", "fits: "):
        assert word in out


def test_the_memory_of_a_gpu(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = run(capsys, str(folder), "--device", "cuda")
    assert "CUDA graphs" in out and "this machine has no CUDA device" in out
    found = json.loads(run(capsys, str(folder), "--device", "cuda", "--json"))
    assert found["fits"] is None and found["graph_bytes"] > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, said in ((1 << 30, "fits: 1.00 GiB"), (1 << 10, "does not fit now: 1.00 KiB")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2 << 30))
        out = run(capsys, str(folder), "--device", "cuda")
        assert f"{said} of this CUDA device's 2.00 GiB are free" in out


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = run(capsys, str(folder), "--quant", "awq", "--format", "int8", code=2)
    assert "awq works with int4" in error
    assert error.count("\n") == 1
    assert "no file or folder" in run(capsys, "nowhere", code=2)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (5, 2048, 3 << 20, 2 << 30, 4 << 40)] == [
        "5 B",
        "2.00 KiB",
        "3.00 MiB",
        "2.00 GiB",
        "4096.00 GiB",
    ]
