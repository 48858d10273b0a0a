"""Quantize a model with llm-compressor and say what it gives; the other half of llm_compressor.py.

    PYTHON llm_compressor_worker.py FOLDER          (PYTHON: of an environment with llm-compressor)

It runs in an environment of its own, because llm-compressor wants another transformers, and so
imports nothing of ours. FOLDER holds request.json {"model", "schemes": [{"label", "method", "bits",
"group_size", "strength"}]} and tokens.safetensors: "calibration" int64 [S, L] and "windows" int64
[W, L]. For each scheme, and once unquantized as "original", LABEL.safetensors is written there,
unless it is there already: "logits" float32 [W, L, V] of the windows. Versions go to versions.json.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

LEFT = ["lm_head"]
# Samples are of one length, so that together they give the same sums as one by one, only sooner.
BATCH = 16
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def main() -> None:
    # AWQ pins its cached activations for copies to an accelerator; without one, torch refuses.
    IntermediatesCache.pin_memory = lambda cache, index: None
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    tokens = load_file(folder / "tokens.safetensors")
    (folder / "versions.json").write_text(json.dumps({name: version(name) for name in PACKAGES}))
    source = request["model"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    for scheme in ({"label": "original"}, *request["schemes"]):
        made = folder / f"{scheme['label']}.safetensors"
        if made.exists():
            continue
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        if "method" in scheme:
            reset_session()
            batches = [{"input_ids": ids} for ids in tokens["calibration"].split(BATCH)]
            data = DataLoader(batches, batch_size=None)
            oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe(scheme, model))
        with torch.no_grad():
            logits = [model(ids[None], use_cache=False).logits[0] for ids in tokens["windows"]]
        save_file(
            {"logits": torch.stack(logits).float()}, folder / f"{scheme['label']}.safetensors"
        )
        print(scheme["label"], flush=True)


def recipe(scheme: dict[str, Any], model: torch.nn.Module) -> list[Any]:
    """The modifiers of a scheme, with their own defaults for all that the scheme does not say."""
    if scheme["method"] == "smoothquant":
        strength = scheme["strength"]
        return [
            SmoothQuantModifier(smoothing_strength=strength),
            QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=LEFT),
        ]
    groups = _groups(model, scheme["bits"], scheme["group_size"])
    if scheme["method"] == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=LEFT)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=LEFT)]


def _groups(model: torch.nn.Module, bits: int, size: int) -> dict[str, QuantizationScheme]:
    """Asymmetric groups of `size`; linears whose features it does not divide: one group a row."""
    linears = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in LEFT
    }
    form = {"num_bits": bits, "type": "int", "symmetric": False, "dynamic": False}
    whole = [name for name, features in linears.items() if features % size]
    grouped = [name for name in linears if name not in whole]
    found = {}
    if grouped:
        args = QuantizationArgs(**form, strategy="group", group_size=size)
        found["groups"] = QuantizationScheme(targets=grouped, weights=args)
    if whole:
        args = QuantizationArgs(**form, strategy="channel")
        found["rows"] = QuantizationScheme(targets=whole, weights=args)
    return found


if __name__ == "__main__":
    main()
