"""The runtime over compiled artifacts: what must change no token changes none, on real kernels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.artifacts import DEMO, smelt
from transformers import AutoModelForCausalLM

from smelt import SamplingParams, load
from smelt.runtime.beam import beam_search
from smelt.runtime.llm import LLM
from smelt.runtime.outputs import Output

QUESTIONS = (
    "What is 17 + 25?",
    "Sort these numbers: 42, 7, 19, 3",
    "Spell the word garden.",
    "Tom has a red ball. What colour is the ball?",
    "How are you today?",
    "What is 17 + 31?",
)
PARAMS = SamplingParams(max_tokens=24)


def prompts(llm: LLM) -> list[list[int]]:
    system = {"role": "system", "content": "Answer briefly and be kind to the one who asks."}
    return [llm.chat_prompt([system, {"role": "user", "content": q}]) for q in QUESTIONS]


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    return [[c.token_ids for c in output.outputs] for output in outputs]


@pytest.mark.parametrize("sampled", [False, True])
def test_deterministic_tokens_depend_on_nothing_but_the_prompt(awq: Path, sampled: bool) -> None:
    """Alone, batched, chunked, preempted, from the cache: W4A16 kernels and a bf16 lm_head."""
    found = {}
    for name, options in {
        "batch": {},
        "chunks of 5": {"max_tokens": 5},
        "preempted": {"kv_cache_tokens": 80},
        "drafted": {"draft": "ngram", "draft_tokens": 3},
    }.items():
        with load(awq, deterministic=True, **{"kv_cache_tokens": 4096, **options}) as llm:
            params = llm.chat_params(PARAMS)
            if sampled:
                params = replace(params, temperature=0.8, seed=3, n=2)
            asked = prompts(llm)
            found[name] = tokens(llm.generate(asked, params))
            if name == "batch":
                found["cached"] = tokens(llm.generate(asked, params))
                assert llm.engine.metrics.hit_rate > 0.4
                llm.engine.scheduler.cache.clear()
                found["alone"] = [tokens(llm.generate([p], params))[0] for p in asked]
            if name == "preempted":
                assert llm.engine.metrics.preemptions > 0
    for name, each in found.items():
        assert each == found["batch"], name


def test_beams_are_those_of_transformers(fp32: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with load(fp32, kv_cache_tokens=4096) as llm:
        end = llm.tokenizer.eos_token_id
        for question in QUESTIONS[:4]:
            prompt = llm.chat_prompt([{"role": "user", "content": question}])
            for width, penalty, early in ((2, 1.0, False), (4, 0.6, True), (5, 1.4, False)):
                ours = beam_search(
                    llm, prompt, width, max_tokens=12, length_penalty=penalty, early_stopping=early
                )
                theirs = model.generate(
                    torch.tensor([prompt]),
                    num_beams=width,
                    num_return_sequences=width,
                    max_new_tokens=12,
                    length_penalty=penalty,
                    early_stopping=early,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                )
                best = theirs[0, len(prompt) :].tolist()
                while len(best) > 1 and best[-1] == best[-2] == end:
                    best.pop()  # padding
                assert ours.token_ids == best, (question, width)


def test_a_smaller_artifact_drafts_and_changes_no_token(fp32: Path, draft: Path) -> None:
    plain = smelt("generate", fp32, *QUESTIONS, "-n", "20", "--json").stdout
    drafted = smelt(
        *("generate", fp32, *QUESTIONS, "-n", "20", "--json"),
        *("--draft", draft, "--draft-tokens", "3", "--deterministic"),
    ).stdout
    texts = [[o["text"] for o in json.loads(out)["outputs"]] for out in (plain, drafted)]
    assert texts[0] == texts[1]
    bench = smelt("bench", fp32, "--draft", draft, "--draft-tokens", "3", "--rounds", "1", "--json")
    found = json.loads(bench.stdout)
    assert found["acceptance"] > 0.3
    assert found["accepted_length"] > 1.5


def test_a_draft_with_another_vocabulary_is_refused(
    fp32: Path, draft: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(draft, tmp_path / "draft"))
    path = other / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("<|system|>", "<|sistem|>"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"].pop("tokenizer.json")
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert path.read_text() != text
    refused = smelt("generate", fp32, "a", "--draft", other, code=2)
    assert "another vocabulary" in refused.stderr
