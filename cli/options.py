"""Options that generating verbs share, so that they are named and explained alike.

Their ranges are checked where they are used (`SamplingParams`, the engine), for the library too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

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
