"""Options that generating verbs share, so that they are named and explained alike.

Their ranges are checked where they are used (`SamplingParams`, the engine), for the library too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from smelt.runtime.errors import UserError

if TYPE_CHECKING:
    from smelt.runtime.structured import Structured

Artifact = Annotated[
    Path, typer.Argument(metavar="OUT", help="The artifact's folder.", show_default=False)
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample within this much probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample among so many; 0 is all.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", help="Drop tokens below this share of the best."),
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 avoids repeating; 1 is none.")
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")]
Stop = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer evaluates it on Python 3.10)
    typer.Option("--stop", help="Stop before this text; repeatable.", show_default=False),
]
CacheTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--kv-cache-tokens", help="Tokens the KV cache holds.", show_default=False),
]
CacheFraction = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--kv-cache-fraction",
        help="Or: share of the free memory for it (0.4).",
        show_default=False,
    ),
]
Draft = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--draft",
        help="Draft ahead: ngram, or the artifact of a smaller model with the same vocabulary.",
        show_default=False,
    ),
]
DraftTokens = Annotated[
    str, typer.Option("--draft-tokens", help="Tokens to draft; auto is as many as pay.")
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Tokens depend on nothing but the prompt; slower for few requests."
    ),
]
JsonSchema = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json-schema", help="Answer JSON of this schema file.", show_default=False),
]
Regex = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--regex", help="The whole answer matches this.", show_default=False),
]
Grammar = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--grammar", help="Answer by this EBNF file (GBNF).", show_default=False),
]
Choice = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--choice", help="Answer one of these; repeatable.", show_default=False),
]


def engine_options(
    kv_cache_tokens: int | None,
    kv_cache_fraction: float | None,
    draft: str | None = None,
    draft_tokens: str = "auto",
    deterministic: bool = False,
) -> dict[str, Any]:
    """Options of `smelt.load`; `UserError` for a number of draft tokens that is none."""
    count = None
    if draft_tokens != "auto":
        if not draft_tokens.isdigit() or not 1 <= int(draft_tokens) <= 32:
            raise UserError(f"--draft-tokens is {draft_tokens!r}: give auto, or a number to 32")
        count = int(draft_tokens)
    return {
        "kv_cache_tokens": kv_cache_tokens,
        "kv_cache_fraction": kv_cache_fraction,
        "draft": draft,
        "draft_tokens": count,
        "deterministic": deterministic,
    }


def structured(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choice: list[str] | None
) -> Structured | None:
    """What the answer has to match; `UserError` where several are given or a file is unreadable."""
    given: dict[str, Any] = {}
    if json_schema is not None:
        given["json_schema"] = _text(json_schema, "--json-schema")
    if regex is not None:
        given["regex"] = regex
    if grammar is not None:
        given["grammar"] = _text(grammar, "--grammar")
    if choice:
        given["choice"] = choice
    if not given:
        return None
    from smelt.runtime.structured import Structured

    return Structured(**given)


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read: {error}") from error
