"""`smelt eval OUT --text FILE`: perplexity, and distance from the original model.

The protocol (windows, BOS, which tokens are scored) stands in `smelt.runtime.evaluation` and is
printed with every result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from smelt.runtime.errors import UserError

from .options import Artifact
from .progress import counting

if TYPE_CHECKING:
    from smelt.runtime.evaluation import Evaluation, Score
    from smelt.runtime.llm import LLM
    from smelt.runtime.tokenizer import Tokenizer

# Two tokenizers are compared on this much of the text.
COMPARED_CHARACTERS = 20_000


def command(
    artifact: Artifact,
    text: Annotated[
        Path, typer.Option("--text", help="UTF-8 text to predict.", show_default=False)
    ],
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--against",
            help="The original model (folder or hub name), or another artifact.",
            show_default=False,
        ),
    ] = None,
    against_dtype: Annotated[
        str,
        typer.Option("--against-dtype", help="Original in fp32, bf16, fp16, or auto (its own)."),
    ] = "fp32",
    ctx: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--ctx", help="Tokens of a window; default 512 or the context.", show_default=False
        ),
    ] = None,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--stride", help="Tokens between windows; default half of one.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-tokens", help="Only so many of the text.", show_default=False),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the original's folder.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Perplexity of a text; with --against also KL divergence and top-1 agreement."""
    from smelt import load
    from smelt.runtime.evaluation import DEFAULT_CONTEXT, evaluate, prepare, read_text

    content = read_text(text)
    with load(artifact, kv_cache_tokens=max(ctx or 0, 4 * DEFAULT_CONTEXT)) as llm:
        context = llm.engine.context
        original: Score | None = None
        if against is not None:
            original, other = _original(against, against_dtype, trust_remote_code, llm, content)
            context = min(context, other)
        windows = prepare(
            content, llm.tokenizer, context=context, ctx=ctx, stride=stride, max_tokens=max_tokens
        )
        with counting("scoring windows") as progress:
            found = evaluate(windows, llm.logits, original, progress)
    if as_json:
        import json

        print(json.dumps(found.to_json()))
    else:
        print(report(found))


def _original(
    name: str, dtype: str, trust_remote_code: bool, llm: LLM, text: str
) -> tuple[Score, int]:
    """(scorer, context) of what the artifact is compared with."""
    folder = Path(name).expanduser()
    if (folder / "manifest.json").is_file():
        from smelt import load

        other = load(folder, kv_cache_tokens=llm.engine.memory.capacity)
        _check_vocabulary(llm, other.engine.program.vocab_size, other.tokenizer, name, text)
        return other.logits, other.engine.context
    from smelt.compiler.evaluation import EagerModel

    model = EagerModel(name, dtype, trust_remote_code)
    _check_vocabulary(llm, model.vocab_size, model.tokenizer(), name, text)
    return model.logits, model.context


def _check_vocabulary(
    llm: LLM, size: int, tokenizer: Tokenizer | None, name: str, text: str
) -> None:
    """Raise UserError unless both models mean the same tokens."""
    own = llm.engine.program.vocab_size
    if size != own:
        raise UserError(
            f"the artifact's vocabulary has {own} tokens and that of {name} {size}: "
            "--against needs the model the artifact was made from"
        )
    sample = text[:COMPARED_CHARACTERS]
    if tokenizer is not None and tokenizer.encode(sample) != llm.tokenizer.encode(sample):
        raise UserError(
            f"the artifact and {name} tokenise the text differently: "
            "--against needs the model the artifact was made from"
        )


def report(found: Evaluation) -> str:
    """The result as a few lines."""
    lines = [
        f"tokens scored        {found.tokens}",
        f"perplexity           {found.perplexity:.4f}",
        f"bits per byte        {found.bits_per_byte:.4f}",
    ]
    if found.kl is not None:
        lines += [
            f"original perplexity  {found.perplexity_original:.4f}",
            f"KL(original || this) {found.kl:.5f} nats",
            f"top-1 agreement      {100 * (found.top1_agreement or 0.0):.2f} %",
        ]
    return "\n".join([*lines, f"protocol: {found.protocol}"])
