"""`make demo`: compile the shipped model with AWQ, run it, and show what came of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import smelt
from smelt.cli.app import quiet_libraries
from smelt.cli.compile import size, summary
from smelt.cli.progress import reporting
from smelt.compiler.api import Artifact
from smelt.models.demo.data import END
from smelt.models.demo.evaluate import task_accuracy, transformers_generate_fn

QUESTIONS = (
    "What is 17 + 25?",
    "Sort these numbers: 42, 7, 19, 3",
    "Tom has a red ball. What colour is the ball?",
    "How are you today?",
)
PER_TASK = 24


def main(model: Path, out: Path) -> None:
    quiet_libraries()
    print(f"compiling {model} with AWQ (int4, groups of 128) into {out}")
    with reporting() as report:
        calibration = str(model.parent / "calibration.txt")
        artifact = smelt.compile(
            model, out, quant="awq", calib=calibration, force=True, progress=report
        )
    assert isinstance(artifact, Artifact)
    for line in summary(artifact.manifest):
        print(f"  {line}")
    started = time.perf_counter()
    with smelt.load(out) as llm:
        print(f"  opened in {time.perf_counter() - started:.2f} s\n")
        for question in QUESTIONS:
            output = llm.chat([{"role": "user", "content": question}])
            print(f"  you    {question}\n  model  {output.text.strip()}")
        prompt = "Once upon a time there was a small fox who"
        output = llm.generate([prompt], smelt.SamplingParams(max_tokens=128, ignore_eos=True))[0]
        print(f"\n  {output.decode_tokens_per_s:.0f} tokens/s for one sequence")
        print("\naccuracy on held-out questions, original -> artifact")

        def generate(prompts: list[str]) -> list[str]:
            tokens = [llm.tokenizer.encode(text, add_special_tokens=False) for text in prompts]
            params = smelt.SamplingParams(max_tokens=64)
            return [o.text.split(END)[0] for o in llm.generate(tokens, params)]

        after = task_accuracy(generate, PER_TASK)
    before = task_accuracy(transformers_generate_fn(model), PER_TASK)
    for task, score in before.items():
        print(f"  {task:<15} {score:4.0%} -> {after[task]:4.0%}")
    mean = sum(before.values()) / len(before), sum(after.values()) / len(after)
    print(f"  {'mean':<15} {mean[0]:4.0%} -> {mean[1]:4.0%}")
    original, packed = artifact.manifest.model["source_bytes"], (out / "weights.safetensors").stat()
    print(f"\nsize {size(original)} -> {size(packed.st_size)}")
    print(f"next: .venv/bin/smelt chat {out}")
    print(f"      .venv/bin/smelt inspect {out} --passes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
