"""lm-evaluation-harness over an artifact: its model "smelt".

    lm = smelt.lm_eval.SmeltLM("OUT")
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

    python -m smelt.lm_eval run --model smelt --model_args path=OUT --tasks hellaswag

The last line is the harness's own command line with our model known to it; `smelt eval OUT --tasks
hellaswag` is the short way. Special tokens, stop
strings and the truncation of long contexts are as in the harness's `hf` model, so that scores of an
artifact compare with those of the model it was made from; the engine batches by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .runtime.errors import SmeltError, UserError
from .runtime.llm import LLM
from .runtime.sampling_params import SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'smelt[eval]'"
    ) from error

# Logits of a group of requests are held at once; beyond this many bytes a group ends.
GROUP_BYTES = 128 << 20
# Requests that are generated together: many more than run at a time, few enough to show progress.
GENERATED = 128
# Options of a task's generation_kwargs that the sampler has, too.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# (context and continuation as text, or None), context ids, continuation ids
TokenRequest = tuple[Any, list[int], list[int]]


@register_model("smelt")
class SmeltLM(TemplateLM):
    """A smelt artifact as a model of lm-evaluation-harness.

    path: the artifact, or an open `LLM`. max_length: tokens of context and continuation, the
    artifact's context by default. add_bos_token: begin texts with BOS or not, whatever the
    tokenizer does. prefix_token_id: stands before texts without a context; BOS, or else the end
    token, by default. kv_cache_tokens: as in `smelt.load`. batch_size, max_batch_size and device
    are taken because the harness's command line always passes them, and change nothing: the engine
    batches, and the artifact was compiled for its device. Raises UserError.
    """

    def __init__(
        self,
        path: str | Path | LLM,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        kv_cache_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        from smelt import load

        super().__init__()
        self.llm = path if isinstance(path, LLM) else load(path, kv_cache_tokens=kv_cache_tokens)
        self.tokenizer = self.llm.tokenizer
        self.backend = "causal"
        self._device = self.llm.engine.program.device
        capacity = self.llm.engine.capacity
        if max_length is not None and not 2 <= max_length <= capacity:
            raise UserError(f"max_length={max_length}: give 2 or more, at most {capacity}")
        self.max_length = max_length or capacity
        self.max_gen_toks = 256
        self.batch_size = batch_size or 1
        self._add_bos = add_bos_token
        self._prefix = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises UserError where the model has none."""
        end = self.tokenizer.eos_token_id
        ends = sorted(self.llm.engine.eos_token_ids) if end is None else [end]
        if not ends:
            raise UserError("the model names no end token: give prefix_token_id in --model_args")
        return int(ends[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in the harness's request cache."""
        return str(self.tokenizer.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source. Raises UserError where the model has none, or for a name."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise UserError(f"chat template {chat_template}: an artifact has one; give no name")
        return self._template().source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt its last message stays open."""
        template = self._template()
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _template(self) -> Any:
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError("this model has no chat template: leave --chat-template out")
        return template

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; by default with special tokens unless the text begins with them already."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            has_it = bool(prefix) and string.startswith(prefix)
            add_special_tokens = not has_it and self._add_bos is not False
        ids = self.tokenizer.encode(string, add_special_tokens)
        bos = self.tokenizer.bos_token_id
        if self._add_bos and add_special_tokens and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding writes it) a request."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood requests")
        for group in self._groups(requests):
            inputs = list(group)
            last = [max(len(requests[i][2]) for i in group[tokens]) for tokens in inputs]
            logits = self.llm.logits([list(tokens) for tokens in inputs], last)
            for tokens, rows in zip(inputs, logits, strict=True):
                likelihood, best = rows.log_softmax(-1), rows.argmax(-1)
                for i in group[tokens]:
                    texts, _context, continuation = requests[i]
                    wanted = torch.tensor(continuation, device=rows.device)
                    picked = likelihood[-len(wanted) :].gather(-1, wanted[:, None])
                    greedy = bool((best[-len(wanted) :] == wanted).all())
                    results[i] = (float(picked.sum()), greedy)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, results[i])
                    bar.update(1)
        bar.close()
        return results

    def _groups(
        self, requests: Sequence[TokenRequest]
    ) -> Iterator[dict[tuple[int, ...], list[int]]]:
        """Requests by what the model sees; answers of one token to one question see the same."""
        group: dict[tuple[int, ...], list[int]] = {}
        row_bytes = 4 * self.llm.engine.program.vocab_size
        rows = 0
        for i in sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2])):
            _, context, continuation = requests[i]
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens after {len(context)}: it needs "
                    f"one or more after one or more, and at most {self.max_length}"
                )
            # The last token is predicted and not read, and what is too long loses its beginning.
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            if tokens not in group:
                if rows and (rows + len(continuation)) * row_bytes > GROUP_BYTES:
                    yield group
                    group, rows = {}, 0
                rows += len(continuation)
            group.setdefault(tokens, []).append(i)
        if group:
            yield group

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; long ones in windows that overlap by one token."""
        windows: list[TokenRequest] = []
        ends = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        starts = [0, *ends[:-1]]
        results = [sum(scores[a:b]) for a, b in zip(starts, ends, strict=True)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string, an end token or its limit."""
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        results: list[str] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until requests")
        for at in range(0, len(requests), GENERATED):
            part = [request.args for request in requests[at : at + GENERATED]]
            stops = [handle_stop_sequences(normalize_gen_kwargs(o)["until"], end) for _, o in part]
            params = [self._params(part[i][1], stops[i], at + i) for i in range(len(part))]
            prompts = [self._prompt(text, p) for (text, _), p in zip(part, params, strict=True)]
            outputs = self.llm.generate(prompts, params)
            for arguments, until, output in zip(part, stops, outputs, strict=True):
                if output.error is not None:
                    raise SmeltError(f"a request of lm-evaluation-harness failed: {output.error}")
                text = postprocess_generated_text(output.text, until, None)
                self.cache_hook.add_partial("generate_until", arguments, text)
                results.append(text)
                bar.update(1)
        bar.close()
        return results

    def _params(self, options: dict[str, Any], stops: list[str], index: int) -> SamplingParams:
        wanted = normalize_gen_kwargs(options, self.max_gen_toks)
        limit, sampled = wanted.pop("max_gen_toks"), wanted.pop("do_sample")
        wanted.pop("until")
        if not limit < self.max_length:
            raise UserError(
                f"a task asks for {limit} new tokens, the context is {self.max_length}: "
                "nothing would be left for the question"
            )
        # None, False and 1 (num_beams) leave an option off.
        unknown = [k for k, v in wanted.items() if k not in SAMPLING and v not in (None, False, 1)]
        if unknown:
            raise UserError(
                f"generation option {', '.join(unknown)}: smelt has {', '.join(SAMPLING)}"
            )
        chosen = {k: v for k, v in wanted.items() if sampled and k in SAMPLING and v is not None}
        if sampled:
            chosen.setdefault("temperature", 1.0)
        # Requests of one question, asked again to be sampled again, must not give one answer.
        return SamplingParams(
            max_tokens=limit,
            stop=tuple(stop for stop in stops if stop),
            stop_token_ids=(self.eot_token_id,),
            seed=index if sampled else None,
            **chosen,
        )

    def _prompt(self, text: str, params: SamplingParams) -> list[int]:
        assert params.max_tokens is not None
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        return tokens[-(self.max_length - params.max_tokens) :]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
