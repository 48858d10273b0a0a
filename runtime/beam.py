"""Beam search over an engine: the likeliest answers, not the likeliest next tokens.

Each step asks the model once for every beam; the prefix cache holds what beams share, so a step
costs one token a beam.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import UserError
from .outputs import Completion, Output
from .sampling_params import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from .llm import LLM, Prompt


@dataclass
class _Beam:
    tokens: list[int] = field(default_factory=list)
    total: float = 0.0

    def score(self, length_penalty: float) -> float:
        return self.total / max(1, len(self.tokens)) ** length_penalty


def beam_search(
    llm: LLM,
    prompt: Prompt,
    width: int = 4,
    *,
    max_tokens: int = 64,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Output:
    """The `width` best answers, best first, as transformers finds them (`num_beams=width`).

    A beam's score is the sum of its tokens' log probabilities over its length to the power of
    length_penalty. early_stopping: end as soon as `width` beams have ended; otherwise when no
    running beam can still beat the worst of them. `UserError` for a width outside 1 to 10.
    """
    most = MAX_LOGPROBS // 2
    if not 1 <= width <= most:
        raise UserError(f"a beam width of {width}: give 1 to {most}")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}: give 1 or more")
    tokens = llm.encode(prompt)
    ends = llm.engine.eos_token_ids
    params = SamplingParams(max_tokens=1, logprobs=2 * width, ignore_eos=True)
    running, ended = [_Beam()], list[_Beam]()
    for length in range(1, max_tokens + 1):
        found = llm.generate([tokens + beam.tokens for beam in running], params)
        for output in found:
            if output.error is not None:
                raise UserError(f"beam search stopped after {length - 1} tokens: {output.error}")
        candidates = [
            _Beam([*beam.tokens, token], beam.total + logprob)
            for beam, output in zip(running, found, strict=True)
            for token, logprob in (output.logprobs or [])[0].top
        ]
        candidates.sort(key=lambda beam: beam.total, reverse=True)
        running = []
        # An end below the first `width` is no answer: other beams would have gone on before it.
        for rank, beam in enumerate(candidates[: 2 * width]):
            if beam.tokens[-1] in ends:
                if rank < width:
                    ended.append(beam)
            elif len(running) < width:
                running.append(beam)
        ended = _best(ended, width, length_penalty)
        if len(ended) == width and (
            early_stopping
            or max(b.total / length**length_penalty for b in running)
            <= ended[-1].score(length_penalty)
        ):
            break
    else:
        ended = _best(ended + running, width, length_penalty)
    return Output([_completion(llm, i, beam) for i, beam in enumerate(ended)], len(tokens))


def _best(beams: list[_Beam], width: int, length_penalty: float) -> list[_Beam]:
    return sorted(beams, key=lambda b: b.score(length_penalty), reverse=True)[:width]


def _completion(llm: LLM, index: int, beam: _Beam) -> Completion:
    stopped = bool(beam.tokens) and beam.tokens[-1] in llm.engine.eos_token_ids
    text = llm.tokenizer.decode(beam.tokens[:-1] if stopped else beam.tokens)
    reason = "stop" if stopped else "length"
    return Completion(index, text, beam.tokens, reason, cumulative_logprob=beam.total)
