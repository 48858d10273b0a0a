"""Every pair of the runtime's features at once, against the output without them.

    python -m benchmarks.crossings --docs docs/crossings.md      what `make crossings` runs

The demo model is compiled once for each cache format, with full attention and with a sliding
window (its weights as a Mistral). A cell of the table is the pair of its row and column, in
deterministic mode: eight prompts answered at once must give the tokens that each gives alone with
the features that change tokens by themselves (cache format, window, structure, several sampled
answers) and without the others. A cell is written only if its features were seen to act (prompts
found in the cache, preemptions, drafts taken ...). The exit code is 1 if any cell differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import smelt
from smelt.runtime.llm import LLM
from smelt.runtime.outputs import Output
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.structured import Structured

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo" / "smelt-demo"
DRAFT = ROOT / "models" / "demo" / "smelt-demo-draft"
WINDOW = 24
MARKER = "crossings"

DRAFTERS = ("n-gram", "draft", "medusa")
FORMATS = {"KV int8": "int8", "KV int4": "int4"}
FEATURES = (
    *("prefix cache", "chunked prefill", "preemption", *DRAFTERS),
    *(*FORMATS, "structured output", "n > 1", "sliding window"),
)
QUESTIONS = (
    "What is 17 + 25?",
    "Sort these numbers: 42, 7, 19, 3",
    "Spell the word garden.",
    "What is 9 times 6?",
    "Tom has a red ball. What colour is the ball?",
    "How are you today?",
    "What is 90 - 14?",
    "What is 17 + 31?",
)


def refused(pair: set[str]) -> str | None:
    """Why a pair cannot be asked for, as users are told; None if it can."""
    if len(pair & set(DRAFTERS)) > 1:
        return "refused: one --draft at a time"
    if len(pair & FORMATS.keys()) > 1:
        return "refused: one --kv-cache an artifact"
    return None


class Artifacts:
    """Compiled on first use, in one folder: by cache format and window; the draft model's."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.backend = folder, backend

    def target(self, pair: set[str]) -> Path:
        kv = next((FORMATS[f] for f in FORMATS if f in pair), "auto")
        window = "sliding window" in pair
        features = {"features": "final"} if "medusa" in pair else {}
        name = "-".join((kv, "window" if window else "full", *features))
        source = self._windowed() if window else DEMO
        return self._made(name, source, kv_cache=kv, **features)

    def draft(self) -> Path:
        return self._made("draft", DRAFT)

    def _made(self, name: str, source: Path, **options: str) -> Path:
        out = self.folder / name
        if not (out / "manifest.json").is_file():
            print(f"compiling {name}", file=sys.stderr, flush=True)
            smelt.compile(source, out, backend=self.backend, force=True, **options)
        return out

    def _windowed(self) -> Path:
        """The demo's weights as a Mistral, whose layers all see `WINDOW` tokens."""
        folder = self.folder / "mistral"
        if not folder.is_dir():
            scratch = Path(shutil.copytree(DEMO, self.folder / "mistral.new", dirs_exist_ok=True))
            config = json.loads((scratch / "config.json").read_text())
            config |= {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": WINDOW,
            }
            (scratch / "config.json").write_text(json.dumps(config))
            scratch.rename(folder)
        return folder


def parameters(pair: set[str]) -> SamplingParams:
    """Of every request of a cell."""
    params = SamplingParams(max_tokens=24)
    if "n > 1" in pair:
        params = replace(params, n=3, temperature=0.9, seed=7)
    if "preemption" in pair:  # answers that outgrow the cache, however few steps they take
        params = replace(params, max_tokens=48, ignore_eos=True)
    if "structured output" in pair:
        params = replace(params, structured=Structured(regex="[A-Za-z0-9 .,+-]{4,20}[.!]"))
    return params


@contextlib.contextmanager
def opened(artifacts: Artifacts, pair: set[str], plain: bool) -> Iterator[LLM]:
    """The cell's artifact; plain: without the features that must change nothing."""
    options: dict[str, object] = {
        "deterministic": True,
        "kv_cache_tokens": 2048,
        "prefix_cache": False,
    }
    if not plain:
        options["prefix_cache"] = "prefix cache" in pair
        if "chunked prefill" in pair:
            options["max_tokens"] = 7
        if "preemption" in pair:
            options["kv_cache_tokens"] = 96
        if "n-gram" in pair:
            options |= {"draft": "ngram", "draft_tokens": 3}
        if "draft" in pair:
            options |= {"draft": str(artifacts.draft()), "draft_tokens": 3}
        if "medusa" in pair:
            options |= {"draft": f"medusa:{DEMO}-medusa", "draft_tokens": 2}
    with smelt.load(artifacts.target(pair), **options) as llm:
        yield llm


def tokens(outputs: list[Output]) -> list[list[list[int]]]:
    for output in outputs:
        assert output.error is None, output.error
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def cell(artifacts: Artifacts, pair: set[str]) -> str:
    """ "equal", why it is refused, or what is wrong."""
    why = refused(pair)
    if why is not None:
        return why
    with opened(artifacts, pair, plain=True) as llm:
        prompts = [llm.chat_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
        params = llm.chat_params(parameters(pair))
        wanted = [tokens(llm.generate([prompt], params))[0] for prompt in prompts]
    with opened(artifacts, pair, plain=False) as llm:
        if "prefix cache" in pair:
            llm.generate(prompts[:4], params)  # what the others find
        found = tokens(llm.generate(prompts, params))
        missing = idle(llm, pair)
        llm.engine.check_integrity()
    if missing:
        return f"not seen to act: {missing}"
    different = [i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
    return f"DIFFERS in prompts {different}" if different else "equal"


def idle(llm: LLM, pair: set[str]) -> str | None:
    """A feature of the pair that did not act in this run."""
    metrics = llm.engine.metrics
    acted = {
        "prefix cache": metrics.reused_tokens > 0,
        "preemption": metrics.preemptions > 0,
        "chunked prefill": metrics.steps > metrics.requests,
    }
    acted |= dict.fromkeys(DRAFTERS, metrics.drafted_tokens > 0)
    return next((name for name in pair if not acted.get(name, True)), None)


def table(cells: dict[tuple[str, str], str]) -> str:
    """Markdown: a row and a column a feature, the diagonal is a feature alone."""
    notes = sorted({text for text in cells.values() if text != "equal"})
    signs = {text: f"[{i}]" for i, text in enumerate(notes, 1)} | {"equal": "equal"}
    lines = [
        "| | " + " | ".join(FEATURES) + " |",
        "|---" * (len(FEATURES) + 1) + "|",
    ]
    for i, row in enumerate(FEATURES):
        signed = [signs[cells[a, row]] for a in FEATURES[: i + 1]]
        signed += [""] * (len(FEATURES) - len(signed))
        lines.append(f"| **{row}** | " + " | ".join(signed) + " |")
    return "\n".join([*lines, "", *(f"[{i}] {text}  " for i, text in enumerate(notes, 1))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced")
    parser.add_argument("--artifacts", type=Path, help="a folder to keep them in")
    parser.add_argument("--backend", default="aoti")
    parser.add_argument("--only", action="append", help="a feature; the others are left out")
    given = parser.parse_args()
    chosen = [f for f in FEATURES if not given.only or f in given.only]
    cells = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.artifacts or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = Artifacts(folder, given.backend)
        for a, b in combinations_with_replacement(chosen, 2):
            cells[a, b] = cell(artifacts, {a, b})
            print(f"{a} x {b}: {cells[a, b]}", flush=True)
    wrong = [key for key, text in cells.items() if text.startswith(("DIFFERS", "not seen"))]
    if given.docs is not None and not given.only:
        from .quality import write_into

        write_into(given.docs, MARKER, table(cells))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
