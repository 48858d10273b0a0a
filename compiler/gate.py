"""The quality gate of `smelt compile`: an artifact that lost too much is not put in place.

The finished artifact and the original (eager transformers, float32) score the same text by the
protocol of `smelt.runtime.evaluation`. An artifact that misses a limit is moved aside, so that it
can be looked at, and what stood at the output path stays as it was.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.evaluation import Evaluation, evaluate, prepare, read_text
from smelt.runtime.llm import load

from .calibration_data import BUILTIN

# Tokens of the text that are scored: enough for a KL divergence that is steady to a few percent.
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Gate:
    """Limits of `smelt compile`. max_kl: nats a token, KL(original || artifact); max_ppl_ratio:
    perplexity over the original's; text: what is scored, the shipped calibration text by default.

    Raises UserError for limits that cannot be meant.
    """

    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    text: Path | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl > 0:
            raise UserError(f"--max-kl {self.max_kl:g}: give a number of nats above 0")
        if self.max_ppl_ratio is not None and not self.max_ppl_ratio >= 1:
            raise UserError(f"--max-ppl-ratio {self.max_ppl_ratio:g}: give 1 or more")
        if self.text is not None and not self:
            raise UserError("--gate-text needs --max-kl or --max-ppl-ratio, or nothing is checked")
        if self.text is not None and not self.text.is_file():
            raise UserError(f"--gate-text {self.text}: no such file")

    def __bool__(self) -> bool:
        return self.max_kl is not None or self.max_ppl_ratio is not None

    def missed(self, found: Evaluation) -> str | None:
        """What `found` is above, in words; None when it holds."""
        assert found.kl is not None and found.perplexity_original is not None
        if self.max_kl is not None and not found.kl <= self.max_kl:
            return f"its KL divergence from the original is {found.kl:.4g}, above {self.max_kl:g}"
        ratio = found.perplexity / found.perplexity_original
        if self.max_ppl_ratio is not None and not ratio <= self.max_ppl_ratio:
            return (
                f"its perplexity is {ratio:.4g} times the original's, above {self.max_ppl_ratio:g}"
            )
        return None


def measure(gate: Gate, artifact: Path, model: Path, trust_remote_code: bool) -> Evaluation:
    """Score `artifact` and the original in folder `model` on the gate's text."""
    from .evaluation import EagerModel  # which reads this package's options, as they read this file

    original = EagerModel(model, trust_remote_code=trust_remote_code)
    text = read_text(gate.text or BUILTIN)
    with load(artifact, kv_cache_tokens=min(4096, 4 * original.context)) as llm:
        context = min(llm.engine.context, original.context)
        windows = prepare(text, llm.tokenizer, context=context, max_tokens=MAX_TOKENS)
        return evaluate(windows, llm.logits, original.logits)


def hold(
    gate: Gate, artifact: Path, model: Path | None, out: Path, trust_remote_code: bool
) -> dict[str, Any]:
    """Measure `artifact`; what was found, for the manifest.

    Raises UserError where there is no original to compare with, and SmeltError when a limit is
    missed: the artifact then lies at "<out>.rejected".
    """
    if model is None or not (model / "tokenizer.json").is_file():
        raise UserError(
            "a quality gate compares with the model's folder and reads text: "
            f"{model or 'a module in memory'} has no tokenizer.json"
        )
    found = measure(gate, artifact, model, trust_remote_code)
    reason = gate.missed(found)
    if reason is None:
        return found.to_json()
    aside = out.with_name(out.name + ".rejected")
    if aside.exists():
        shutil.rmtree(aside)
    artifact.rename(aside)
    raise SmeltError(
        f"the artifact misses its quality gate: {reason} ({found.tokens} tokens of "
        f"{gate.text or 'the shipped text'}); it is kept in {aside}. More bits, smaller groups or "
        "--quant awq or gptq lose less"
    )
