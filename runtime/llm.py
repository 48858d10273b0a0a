"""The library's front: open an artifact and ask it for text.

    llm = smelt.load("OUT")
    outputs = llm.generate(["Once upon a time"], smelt.SamplingParams(max_tokens=64))

One `LLM` owns one engine; calls from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .engine import Engine, EngineOptions
from .errors import UserError
from .outputs import Collector, Output, Stream
from .sampling_params import SamplingParams
from .sequence import StepOutput
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from .artifact import LoadedArtifact

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Key = TypeVar("Key")


class LLM:
    """A loaded artifact. path: its folder.

    draft: what proposes tokens: "ngram", trained heads as "medusa:FOLDER" or "eagle3:FOLDER", or
    the folder of a smaller artifact with the same vocabulary. options: the fields of
    `EngineOptions`, by name.
    """

    def __init__(
        self, path: str | Path, *, draft: str | Path | None = None, **options: Any
    ) -> None:
        from .artifact import open_artifact

        unknown = set(options) - {f.name for f in fields(EngineOptions)}
        if unknown:
            raise TypeError(f"load() takes no {sorted(unknown)[0]!r}")
        artifact = open_artifact(Path(path))
        model = artifact.manifest.model
        self.artifact: LoadedArtifact | None = artifact
        self.tokenizer = Tokenizer(artifact.folder)
        eos = _ids(model.get("eos_token_ids", model.get("eos_token_id")))
        if not eos and self.tokenizer.eos_token_id is not None:
            eos = [self.tokenizer.eos_token_id]
        self.bos_token_id = _first_id(model.get("bos_token_id"), self.tokenizer.bos_token_id)
        if draft is not None:
            from .speculation.open import open_drafter

            exact = bool(options.get("deterministic"))
            graphs = bool(options.get("cuda_graphs", True))
            options["drafter"] = open_drafter(
                draft, artifact.program, self.tokenizer, exact, graphs
            )
        self.engine = Engine(
            artifact.program,
            tokenizer=self.tokenizer,
            eos_token_ids=eos,
            max_position=model.get("max_position"),
            options=EngineOptions(**options),
        )
        self._requests: dict[int, Collector] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Answer all prompts, batched; outputs in the order of the prompts.

        prompts: a text, a list of token ids, or a list of either. params: one for all, or one each.
        A failed request has `error` set; if all fail, the first error is raised.
        """
        many = _prompt_list(prompts)
        each = _params_list(params, len(many))
        numbered = ((i, *pair) for i, pair in enumerate(zip(many, each, strict=True)))
        done = dict(self._answer(numbered, len(many)))
        requests = [done[i] for i in range(len(many))]
        if requests and all(request.exception for request in requests):
            requests[0].raise_error()
        return [request.output for request in requests]

    def run(
        self, requests: Iterable[tuple[Key, Prompt, SamplingParams]], in_flight: int | None = None
    ) -> Iterator[tuple[Key, Output]]:
        """Answer requests as they come, each given back with its key when it is done.

        in_flight: how many are taken from `requests` ahead of the answers; by default enough to
        keep every lane of the engine busy.
        """
        limit = in_flight or 4 * self.engine.scheduler.max_running
        for key, collector in self._answer(requests, limit):
            yield key, collector.output

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
    ) -> Stream:
        """Pieces of the answer as they become final; `UserError` if `params` ask for several."""
        params = params or SamplingParams()
        if params.n > 1:
            raise UserError(f"n is {params.n}: a stream gives one answer, use generate")
        request = self._add(self.encode(prompt), params)
        return Stream(request, self._pump, self.engine.abort)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Output:
        """The assistant's answer to {"role", "content"} messages, by the model's chat template.

        variables: further names for the template. `UserError` where the model has no template.
        """
        params = params or SamplingParams(max_tokens=None)
        with self.stream(self.chat_prompt(messages, **variables), self.chat_params(params)) as s:
            for _ in s:
                pass
            return s.output

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError("this model has no chat template: use generate with the whole text")
        # The template writes BOS itself where the model wants one.
        return self.tokenizer.encode(template.render(messages, **variables), False)

    def chat_params(self, params: SamplingParams) -> SamplingParams:
        """The same parameters, ending also at the tokenizer's own end token.

        Templates end turns with it even where the generation configuration names other ids.
        """
        end = self.tokenizer.eos_token_id
        if end is None or params.ignore_eos or end in params.stop_token_ids:
            return params
        return replace(params, stop_token_ids=(*params.stop_token_ids, end))

    def logits(
        self, prompts: Sequence[Sequence[int]], last: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """One float32 [len, V] tensor a prompt; row i: the logits after its tokens 0 to i.

        last: of each prompt, only the rows of so many last tokens.
        """
        from .scoring import score

        return score(self.engine, prompts, last)

    def close(self) -> None:
        """Release caches and program; the object cannot be used after it."""
        self._requests.clear()
        self.engine.close()
        self.artifact = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, behind BOS where the model has one; ids stay as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        tokens = self.tokenizer.encode(prompt)
        if not tokens and self.bos_token_id is not None:
            return [self.bos_token_id]
        if not tokens:
            raise UserError("the prompt is empty, and this model has no BOS token to begin with")
        return tokens

    def collector(self, prompt_tokens: int, params: SamplingParams) -> Collector:
        """What gathers a request's outputs; texts are decoded there, if no stop string is."""
        own = self.tokenizer if not params.stop else None
        return Collector(prompt_tokens, own, params.samples, params.n, params.logprobs is not None)

    def _answer(
        self, requests: Iterable[tuple[Key, Prompt, SamplingParams]], limit: int
    ) -> Iterator[tuple[Key, Collector]]:
        """Each request when it is done, at most `limit` under way; leaving early ends the rest."""
        source = iter(requests)
        active: dict[int, tuple[Key, Collector]] = {}
        try:
            while True:
                while len(active) < limit and (request := next(source, None)) is not None:
                    key, prompt, params = request
                    collector = self._add_or_fail(prompt, params)
                    if collector.done:
                        yield key, collector
                    else:
                        active[collector.id] = (key, collector)
                if not active:
                    return
                self._pump()
                for number in [n for n, (_, c) in active.items() if c.done]:
                    yield active.pop(number)
        finally:
            for number in active:
                self.engine.abort(number)

    def _add_or_fail(self, prompt: Prompt, params: SamplingParams) -> Collector:
        """A prompt that cannot run fails alone, as one that fails while it runs."""
        try:
            return self._add(self.encode(prompt), params)
        except UserError as error:
            failed = Collector(0 if isinstance(prompt, str) else len(prompt))
            failed.take(StepOutput(-1, [], "", "error", error))
            return failed

    def _add(self, tokens: list[int], params: SamplingParams) -> Collector:
        if self.artifact is None:
            raise UserError("this LLM is closed: load the artifact again")
        request = self.collector(len(tokens), params)
        request.id = self.engine.add_request(tokens, params, detokenize=False)
        self._requests[request.id] = request
        return request

    def _pump(self) -> None:
        """One engine step; its outputs go to whoever waits for them."""
        for step in self.engine.step():
            request = self._requests.get(step.id)
            if request is None:
                continue
            request.take(step)
            if request.done:
                del self._requests[step.id]


def load(path: str | Path, **options: Any) -> LLM:
    """Open an artifact for generation.

    kv_cache_tokens: tokens the KV cache holds over all sequences; kv_cache_fraction: of the free
    memory (0.4 if neither is given); draft: as in `LLM`; deterministic: tokens
    depend on nothing but the prompt; further ones as in `EngineOptions`. Raises `UserError` or
    `SmeltError` naming what is wrong.
    """
    return LLM(path, **options)


def _first_id(*candidates: int | None) -> int | None:
    return next((int(c) for c in candidates if c is not None), None)


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(token) for token in value]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UserError(f"{count} prompts but {len(params)} parameters: give one, or one each")
    return list(params)
