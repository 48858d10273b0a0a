"""Random everything for a while: in the end every block is back and memory is where it was.

    python -m benchmarks.soak --minutes 10      what `make soak` runs

An engine over an artifact (the demo model, compiled now, or one given) with a small cache serves
requests with random prompts, lengths, parameters, structures, tenants, priorities and deadlines,
that are cancelled at random, while now and then a step of the model fails. After every second the
books of the block pools are checked; afterwards nothing may run, all blocks but those of the prefix
cache are free, all of them once it is cleared, and the process has not grown: the resident memory
after the last fifth is at most 10 % above that after the second.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import smelt
from smelt.runtime.errors import UserError
from smelt.runtime.llm import LLM
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.structured import Structured

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo" / "smelt-demo"
STRUCTURES = (
    Structured(regex="[a-z]{3,20}"),
    Structured(choice=["yes", "no", "perhaps"]),
    Structured(json_schema={"type": "array", "items": {"type": "integer"}, "maxItems": 4}),
    Structured(regex="(a+)+b"),
    Structured(json_object=True),
)


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS: Linux is needed")


def random_params(rng: random.Random) -> SamplingParams:
    """Anything a request may ask for."""
    sampled = rng.random() < 0.6
    several = sampled and rng.random() < 0.3
    return SamplingParams(
        temperature=rng.choice((0.3, 0.8, 1.5)) if sampled else 0.0,
        top_p=rng.choice((1.0, 0.9, 0.5)),
        top_k=rng.choice((0, 0, 5, 50)),
        min_p=rng.choice((0.0, 0.0, 0.1)),
        typical_p=rng.choice((1.0, 1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.7)),
        frequency_penalty=rng.choice((0.0, 0.0, -0.3)),
        logit_bias={7: 3.0} if rng.random() < 0.1 else {},
        bad_words=[" the"] if rng.random() < 0.1 else [],
        seed=rng.randrange(100),
        max_tokens=rng.choice((1, 5, 20, 60, 150)),
        min_tokens=rng.choice((0, 0, 1)),
        ignore_eos=rng.random() < 0.5,
        stop=rng.choice(((), (), ("e",), ("The", "\n\n"))),
        logprobs=rng.choice((None, None, 0, 5)),
        prompt_logprobs=rng.choice((None, None, None, 2)),
        n=rng.choice((2, 4)) if several else 1,
        structured=rng.choice(STRUCTURES) if rng.random() < 0.15 else None,
    )


class Soak:
    """Drives one engine. failures: the chance that a step of the model raises."""

    def __init__(self, llm: LLM, seed: int, failures: float = 0.002) -> None:
        self.llm, self.engine, self.rng = llm, llm.engine, random.Random(seed)
        self.alive: set[int] = set()
        self.ended: dict[str, int] = {}
        self.refused = 0
        self._prompts: list[list[int]] = [[5, 6, 7]]
        run = self.engine.program.run

        def sometimes(*inputs: Any) -> torch.Tensor:
            if self.rng.random() < failures:
                raise RuntimeError("a failure of the soak's own")
            return run(*inputs)

        self.engine.program.run = sometimes  # type: ignore[method-assign]

    def run(self, seconds: float) -> None:
        """Traffic for so long, checked every second, then until nothing is left."""
        until = time.monotonic() + seconds
        checked = time.monotonic()
        while time.monotonic() < until:
            if len(self.alive) < 24 and self.rng.random() < 0.4:
                self._add()
            if self.alive and self.rng.random() < 0.02:
                self.engine.abort(self.rng.choice(sorted(self.alive)))
            self._step()
            if time.monotonic() - checked > 1:
                self.engine.check_integrity()
                checked = time.monotonic()

    def finish(self) -> None:
        """Let everything end; raises AssertionError where something is left."""
        while self.engine.has_work:
            self._step()
        engine = self.engine
        assert not self.alive, f"requests {self.alive} never ended"
        assert not engine.scheduler.has_work, "the scheduler still has sequences"
        engine.check_integrity()
        engine.scheduler.cache.clear()
        assert engine.memory.free == engine.metrics.blocks, "blocks are lost"

    def _add(self) -> None:
        rng = self.rng
        prompt = list(rng.choice(self._prompts)) if rng.random() < 0.5 else []
        size = self.engine.program.vocab_size
        wanted = rng.choice((0, 1, 8, 40, 200, 10_000))
        prompt += [
            rng.randrange(size + (rng.random() < 0.001)) for _ in range(rng.randint(0, wanted))
        ]
        try:
            number = self.engine.add_request(
                prompt,
                self.llm.chat_params(random_params(rng)),
                priority=rng.randrange(3),
                timeout_s=rng.choice((None, None, None, 0.05, 2.0)),
                salt=rng.choice((None, None, "a", "b")),
            )
        except UserError:
            self.refused += 1  # too long, empty, or a token that does not exist
            return
        self.alive.add(number)
        self._prompts = [*self._prompts[-19:], prompt[:150]]

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finish_reason is None:
                continue
            self.ended[output.finish_reason] = self.ended.get(output.finish_reason, 0) + 1
            if output.id not in self.engine._alive:
                self.alive.discard(output.id)
            if output.error is not None:
                text = str(output.error)
                assert "of the soak's own" in text or "all excluded" in text, text


def soak(llm: LLM, minutes: float, seed: int) -> dict[str, Any]:
    """Run it in five parts; what happened, and the resident memory after each part."""
    driver = Soak(llm, seed)
    sizes = []
    for _ in range(5):
        driver.run(minutes * 60 / 5)
        sizes.append(resident())
    driver.finish()
    assert sizes[-1] <= 1.1 * sizes[1], f"memory grew: {[s >> 20 for s in sizes]} MiB"
    metrics = llm.engine.metrics
    return {
        "ended": driver.ended,
        "refused": driver.refused,
        "steps": metrics.steps,
        "generated": metrics.generated_tokens,
        "preemptions": metrics.preemptions,
        "evictions": metrics.evictions,
        "hit_rate": round(metrics.hit_rate, 3),
        "acceptance": round(metrics.acceptance, 3),
        "resident_mib": [size >> 20 for size in sizes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifact", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.artifact
        if folder is None:
            folder = Path(scratch) / "demo"
            smelt.compile(DEMO, folder, quant="awq", kv_cache="int8", calib_samples=16)
        with smelt.load(
            folder, kv_cache_tokens=1024, policy="priority", draft="ngram", max_tokens=64
        ) as llm:
            print(soak(llm, given.minutes, given.seed))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
