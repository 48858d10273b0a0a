"""`smelt generate OUT "prompt"`: continue one prompt as a stream, or many as a batch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from smelt.runtime.errors import UserError

from .options import (
    Artifact,
    CacheFraction,
    CacheTokens,
    Choice,
    Deterministic,
    Draft,
    DraftTokens,
    Grammar,
    JsonSchema,
    MinP,
    Penalty,
    Regex,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    engine_options,
    structured,
)

if TYPE_CHECKING:
    from smelt.runtime.llm import LLM
    from smelt.runtime.outputs import Completion, Output
    from smelt.runtime.sampling_params import SamplingParams


def command(
    artifact: Artifact,
    prompts: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[PROMPT]...", help="Prompts; none, or -, reads stdin."),
    ] = None,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--file", help="Read prompts from a file, one a line.", show_default=False),
    ] = None,
    requests: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--input", help="Answer a file of requests, JSON lines.", show_default=False),
    ] = None,
    answers: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", help="Where --input's answers go; resumed.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")
    ] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")
    ] = False,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 1,
    logprobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--logprobs", help="Report so many best tokens.", show_default=False),
    ] = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choice = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = "auto",
    deterministic: Deterministic = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    kv_cache_tokens: CacheTokens = None,
    kv_cache_fraction: CacheFraction = None,
) -> None:
    """Continue prompts with an artifact: one is streamed, several run as a batch.

    With several prompts each answer stands behind a line with its prompt. --input answers a file
    of requests through the batching engine: a line is {"prompt": ...} or {"messages": [...]}, with
    an optional "id" and sampling parameters. --output is appended to, and a run that was broken off
    goes on where it stood.
    """
    from smelt.runtime.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        n=n,
        logprobs=logprobs,
        structured=structured(json_schema, regex, grammar, choice),
    )
    options = engine_options(kv_cache_tokens, kv_cache_fraction, draft, draft_tokens, deterministic)
    from smelt import load

    if requests is not None or answers is not None:
        from .batch import answer_file

        if requests is None or answers is None or prompts or file:
            raise UserError("--input FILE and --output FILE go together, and without other prompts")
        answer_file(requests, answers, params, lambda: load(artifact, **options), as_json)
        return
    texts = read_prompts(prompts or [], file)
    with load(artifact, **options) as llm:
        if as_json:
            _print_json(llm.generate(texts, params))
        elif len(texts) == 1 and n == 1 and logprobs is None:
            _stream(llm, texts[0], params)
        else:
            for text, output in zip(texts, llm.generate(texts, params), strict=True):
                print(f">>> {text}")
                for completion in output.outputs:
                    print(output.error or completion.text)
                    _print_logprobs(llm, completion)
                print()


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """From the command line, a file, or stdin; blank lines are no prompts."""
    if file is not None:
        if given:
            raise UserError("prompts are given and --file too: use one of them")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {file} cannot be read: {error}") from error
        return _lines(lines, str(file))
    if given and given != ["-"]:
        return given
    if not given and sys.stdin.isatty():
        raise UserError('no prompt: write one behind the folder, as in smelt generate OUT "Hello"')
    try:
        return _lines(sys.stdin.read().splitlines(), "stdin")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 text: {error}") from error


def _lines(lines: list[str], where: str) -> list[str]:
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{where} holds no prompt: write one a line")
    return prompts


def _stream(llm: LLM, text: str, params: SamplingParams) -> None:
    with llm.stream(text, params) as stream:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)  # also after Ctrl-C or an error, whose line comes next
    if sys.stderr.isatty():
        output = stream.output
        print(
            f"[{output.prompt_tokens} + {len(output.token_ids)} tokens, first after "
            f"{output.ttft_s * 1e3:.0f} ms, {output.decode_tokens_per_s:.1f} tokens/s, "
            f"ended by {output.finish_reason}]",
            file=sys.stderr,
        )


def _print_logprobs(llm: LLM, completion: Completion) -> None:
    """A line a token: its log probability, and the best ones beside it."""
    for entry in completion.logprobs or ():
        best = "  ".join(f"{llm.tokenizer.decode([t], False)!r} {p:.3f}" for t, p in entry.top)
        token = llm.tokenizer.decode([entry.token], False)
        print(f"  {token!r:<16} {entry.logprob:8.3f}  rank {entry.rank:<5} {best}")


def _print_json(outputs: list[Output]) -> None:
    import json

    print(json.dumps({"outputs": [_json(output) for output in outputs]}, ensure_ascii=False))


def _json(output: Output) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_tokens": output.prompt_tokens,
        "finish_reason": output.finish_reason,
        "ttft_s": output.ttft_s,
        "decode_tokens_per_s": output.decode_tokens_per_s,
        "reused_tokens": output.reused_tokens,
    }
    if len(output.outputs) > 1:
        entry["texts"] = [completion.text for completion in output.outputs]
    if output.logprobs is not None:
        entry["logprobs"] = [asdict(entry) for entry in output.logprobs]
    if output.error is not None:
        entry["error"] = output.error
    return entry
