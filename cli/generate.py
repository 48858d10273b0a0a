"""`smelt generate OUT "prompt"`: continue one prompt as a stream, or many as a batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from smelt.runtime.errors import UserError

from .options import (
    Artifact,
    CacheFraction,
    CacheTokens,
    MinP,
    Penalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from smelt.runtime.llm import LLM
    from smelt.runtime.outputs import Output
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    kv_cache_tokens: CacheTokens = None,
    kv_cache_fraction: CacheFraction = None,
) -> None:
    """Continue prompts with an artifact: one is streamed, several run as a batch.

    With several prompts each answer stands behind a line with its prompt.
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
    )
    texts = _prompts(prompts or [], file)
    from smelt import load

    with load(
        artifact, kv_cache_tokens=kv_cache_tokens, kv_cache_fraction=kv_cache_fraction
    ) as llm:
        if as_json:
            _print_json(llm.generate(texts, params))
        elif len(texts) == 1:
            _stream(llm, texts[0], params)
        else:
            for text, output in zip(texts, llm.generate(texts, params), strict=True):
                print(f">>> {text}\n{output.error or output.text}\n")


def _prompts(given: list[str], file: Path | None) -> list[str]:
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
    }
    if output.error is not None:
        entry["error"] = output.error
    return entry
