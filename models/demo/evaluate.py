"""Accuracy per task on the held-out set that is shipped with the models.

    python -m smelt.models.demo.evaluate models/demo/smelt-demo models/demo/smelt-demo-draft

prints a table. `task_accuracy` takes any function from prompts to completions, so a quantized
artifact is judged by the same questions and the same rules as the original weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random
from typing import Any

from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.llm import LLM
from smelt.runtime.sampling_params import SamplingParams

from .data import END, SPECIAL_TOKENS, read_heldout, render
from .tasks import Sample, check

GenerateFn = Callable[[list[str]], list[str]]
PredictFn = Callable[[list[list[int]]], list[list[int]]]
# Most tokens of an answer; the longest of the held-out set takes fewer.
MAX_TOKENS = 96


def questions(n_per_task: int = 64, seed: int = 0) -> dict[str, list[Sample]]:
    """At most so many of each task's shipped questions, drawn by `seed`."""
    return {
        task: Random(f"{task} {seed}").sample(samples, min(n_per_task, len(samples)))
        for task, samples in read_heldout().items()
    }


def task_accuracy(
    generate_fn: GenerateFn,
    n_per_task: int = 64,
    seed: int = 0,
    tasks: Collection[str] | None = None,
) -> dict[str, float]:
    """The share of right answers for each task.

    `generate_fn` is given rendered chats that end where the answer begins, special tokens as
    text, and returns the greedy completions in the same order. What follows the end token is
    ignored. At most the shipped number of samples (64 for most tasks) is drawn, by `seed`.
    `tasks` restricts the evaluation to the tasks it names.
    """
    scores: dict[str, float] = {}
    for task, chosen in questions(n_per_task, seed).items():
        if tasks is not None and task not in tasks:
            continue
        prompts = [render(sample.messages, add_generation_prompt=True) for sample in chosen]
        completions = generate_fn(prompts)
        right = sum(
            check(sample.answers, completion.split(END)[0])
            for sample, completion in zip(chosen, completions, strict=True)
        )
        scores[task] = right / len(chosen)
    return scores


def scored_accuracy(
    predict: PredictFn, encode: Callable[[str], list[int]], n_per_task: int = 64, seed: int = 0
) -> dict[str, float]:
    """As `task_accuracy`, with a forward pass in place of generation.

    An answer is right if each of its tokens, the end token included, is the most likely one after
    those before it: that is when greedy decoding writes it. `predict` is given the tokens of
    rendered chats and returns the most likely token after each of them; `encode` adds no special
    tokens.
    """

    def right(asked: list[tuple[Sample, str]]) -> list[bool]:
        prompts = [render(sample.messages, add_generation_prompt=True) for sample, _ in asked]
        before = [len(encode(prompt)) for prompt in prompts]
        tokens = [encode(p + answer + END) for p, (_, answer) in zip(prompts, asked, strict=True)]
        likely = predict(tokens)
        return [
            best[start - 1 : -1] == ids[start:]
            for best, ids, start in zip(likely, tokens, before, strict=True)
        ]

    scores: dict[str, float] = {}
    for task, chosen in questions(n_per_task, seed).items():
        usual = right([(sample, sample.answer) for sample in chosen])
        # Most are right at once; other forms of the answer are tried where they are not.
        missed = [sample for sample, known in zip(chosen, usual, strict=True) if not known]
        tries = [(sample, form) for sample in missed for form in _other_forms(sample)]
        found = {
            id(sample) for (sample, _), known in zip(tries, right(tries), strict=True) if known
        }
        scores[task] = (sum(usual) + len(found)) / len(chosen)
    return scores


def _other_forms(sample: Sample) -> list[str]:
    """What `check` accepts beside the usual answer: other answers, with a full stop and without."""
    bare = [answer.rstrip(".") for answer in sample.answers]
    forms = dict.fromkeys([*sample.answers, *bare, *(f"{text}." for text in bare)])
    return [form for form in forms if form != sample.answer]


def transformers_generate_fn(folder: Path, batch_size: int = 64) -> GenerateFn:
    """Greedy generation with transformers, in float32 and in batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: list[str]) -> list[str]:
        completions: list[str] = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            inputs = tokenizer(
                part, padding=True, return_tensors="pt", add_special_tokens=False,
                return_token_type_ids=False,
            )  # fmt: skip
            with torch.inference_mode():
                output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
            new = output[:, inputs["input_ids"].shape[1] :]
            completions += tokenizer.batch_decode(new, skip_special_tokens=False)
        return completions

    return generate


def check_artifact(llm: LLM) -> None:
    """Raise UserError unless the artifact was made from a demo model."""
    missing = [token for token in SPECIAL_TOKENS if llm.tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(
            "demo questions are asked in the demo model's chat format, and this model has no "
            f"{missing[0]} token: give an artifact of models/demo/smelt-demo"
        )


def artifact_generate_fn(llm: LLM) -> GenerateFn:
    """Greedy generation with an artifact of a demo model; raises UserError for another."""
    check_artifact(llm)

    def generate(prompts: list[str]) -> list[str]:
        encoded = [llm.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        outputs = llm.generate(encoded, SamplingParams(max_tokens=MAX_TOKENS))
        for output in outputs:
            if output.error is not None:
                raise SmeltError(f"a question of the demo tasks failed: {output.error}")
        return [output.text for output in outputs]

    return generate


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row for each task and a column for each model."""
    heads = list(columns)
    lines = [f"| task | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for task in columns[heads[0]]:
        cells = " | ".join(f"{100 * columns[head][task]:.0f} %" for head in heads)
        lines.append(f"| {task} | {cells} |")
    means = [sum(scores.values()) / len(scores) for scores in columns.values()]
    lines.append(f"| **mean** | {' | '.join(f'**{100 * mean:.1f} %**' for mean in means)} |")
    return "\n".join(lines)


def show_failures(generate_fn: GenerateFn, count: int) -> None:
    """Print a few wrong completions of each task."""
    for task, samples in read_heldout().items():
        prompts = [render(sample.messages, add_generation_prompt=True) for sample in samples]
        wrong = [
            (prompt, completion.split(END)[0], sample.answer)
            for prompt, completion, sample in zip(
                prompts, generate_fn(prompts), samples, strict=True
            )
            if not check(sample.answers, completion.split(END)[0])
        ]
        for prompt, got, wanted in wrong[:count]:
            print(f"{task}: {prompt} got {got!r}, not {wanted!r}")


def main() -> None:
    """Read the command line, evaluate, and print the table."""
    parser = argparse.ArgumentParser(description="Accuracy of demo models per task.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=64, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=int, default=0, help="print some wrong answers per task")
    args = parser.parse_args()
    columns = {}
    for folder in args.models:
        generate = transformers_generate_fn(folder)
        columns[folder.name] = task_accuracy(generate, args.count, args.seed)
        if args.failures:
            show_failures(generate, args.failures)
    print(table(columns))


if __name__ == "__main__":
    main()
