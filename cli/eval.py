"""`smelt eval OUT`: perplexity, distance from the original, long-context retrieval, tasks.

The protocols stand in `smelt.runtime.evaluation` and `smelt.runtime.needle` and are printed with
every result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

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


OptionalStr = Optional[str]  # noqa: UP045  (typer evaluates annotations on Python 3.10)
OptionalInt = Optional[int]  # noqa: UP045
OptionalPath = Optional[Path]  # noqa: UP045


def command(
    artifact: Artifact,
    text: Annotated[
        OptionalPath, typer.Option("--text", help="UTF-8 text to predict.", show_default=False)
    ] = None,
    against: Annotated[
        OptionalStr,
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
        OptionalInt,
        typer.Option(
            "--ctx", help="Tokens of a window; default 512 or the context.", show_default=False
        ),
    ] = None,
    stride: Annotated[
        OptionalInt,
        typer.Option(
            "--stride", help="Tokens between windows; default half of one.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        OptionalInt,
        typer.Option("--max-tokens", help="Only so many of the text.", show_default=False),
    ] = None,
    needle: Annotated[
        OptionalStr,
        typer.Option(
            "--needle",
            help="Long-context retrieval: passkey, repeat (any model) or demo.",
            show_default=False,
        ),
    ] = None,
    needle_lengths: Annotated[
        OptionalStr,
        typer.Option(help="Tokens of its prompts: 4096,16384.", show_default=False),
    ] = None,
    needle_depths: Annotated[
        OptionalStr,
        typer.Option(help="Where it is hidden, in percent: 0,50,100.", show_default=False),
    ] = None,
    needle_trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 4,
    needle_seed: Annotated[int, typer.Option(help="Draws haystacks and needles.")] = 0,
    tasks: Annotated[
        OptionalStr,
        typer.Option(
            "--tasks", help="demo, or lm-evaluation-harness tasks: A,B.", show_default=False
        ),
    ] = None,
    task_path: Annotated[
        OptionalPath, typer.Option(help="Folder with harness tasks of yours.", show_default=False)
    ] = None,
    limit: Annotated[
        OptionalInt, typer.Option(help="Only so many questions a task.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        OptionalInt, typer.Option(help="Examples before a harness question.", show_default=False)
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask harness tasks through the chat template.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the original's folder.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Perplexity (and KL with --against), long-context retrieval, and accuracy on tasks."""
    from smelt import load
    from smelt.runtime.evaluation import DEFAULT_CONTEXT, read_text

    from . import needle as needles
    from . import tasks as task_list

    if text is None and needle is None and tasks is None:
        raise UserError("nothing to measure: give --text FILE, --needle KIND or --tasks NAME")
    if text is None and against is not None:
        raise UserError("--against compares predictions of a text: give --text FILE")
    if needle is not None:
        needles.check(needle)
    wanted = task_list.names(tasks) if tasks is not None else []
    content = None if text is None else read_text(text)
    # Windows need little; needles and tasks may take the whole context.
    cache = max(ctx or 0, 4 * DEFAULT_CONTEXT) if needle is None and tasks is None else None
    results: dict[str, Any] = {}
    lines: list[str] = []
    with load(artifact, kv_cache_tokens=cache) as llm:
        if content is not None:
            sizes = (ctx, stride, max_tokens)
            found = _text(llm, content, sizes, against, against_dtype, trust_remote_code)
            results |= found.to_json()
            lines.append(report(found))
        if needle is not None:
            grid = needles.ask(
                llm, needle, content, needle_lengths, needle_depths, needle_trials, needle_seed
            )
            results["needle"] = grid.to_json()
            lines.append(needles.report(grid))
        if wanted:
            results["tasks"] = task_list.run(
                llm, wanted, task_path, limit, num_fewshot, chat_template
            )
            lines.append(task_list.report(results["tasks"]))
    if as_json:
        import json

        print(json.dumps(results))
    else:
        print("\n".join(lines))


def _text(
    llm: LLM,
    content: str,
    sizes: tuple[int | None, int | None, int | None],
    against: str | None,
    against_dtype: str,
    trust_remote_code: bool,
) -> Evaluation:
    """Perplexity of the text, and how far the original is. sizes: ctx, stride, max_tokens."""
    from smelt.runtime.evaluation import evaluate, prepare

    ctx, stride, max_tokens = sizes
    context = llm.engine.context
    original: Score | None = None
    if against is not None:
        original, other = _original(against, against_dtype, trust_remote_code, llm, content)
        context = min(context, other)
    windows = prepare(
        content, llm.tokenizer, context=context, ctx=ctx, stride=stride, max_tokens=max_tokens
    )
    with counting("scoring windows") as progress:
        return evaluate(windows, llm.logits, original, progress)


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
