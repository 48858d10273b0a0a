"""`smelt bench OUT`: speed of an artifact beside the memory bandwidth of the same minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from smelt.runtime.errors import UserError

from .options import Artifact, Draft, DraftTokens, engine_options
from .progress import counting

if TYPE_CHECKING:
    from smelt.runtime.measure import Measurement
    from smelt.runtime.measure_draft import DraftMeasurement


def command(
    artifact: Artifact,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each prompt.")] = 128,
    gen: Annotated[int, typer.Option("--gen", help="Tokens generated for each.")] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds; medians are printed.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the random prompts.")] = 0,
    draft: Draft = None,
    draft_tokens: DraftTokens = "auto",
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--text", help="With --draft: prompts, one a line.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Measure prefill and decode speed, and how much of the memory bandwidth decoding reaches.

    Prompts are random tokens, end tokens are ignored. The bandwidth is that of all threads reading
    a buffer larger than the caches, timed before every round. A decode step reads the weights once,
    so with one sequence tokens a second times bytes of weights cannot exceed it (cache reads of a
    small model can).

    With --draft, real prompts are answered instead, with the draft and without it in turns, and
    what drafting gains is printed.
    """
    if draft is not None:
        _draft(artifact, draft, draft_tokens, text, gen, rounds, as_json)
        return
    if text is not None:
        raise UserError("--text is for --draft: without one, prompts are random tokens")
    from smelt import load
    from smelt.runtime.measure import bench

    with counting("measuring") as progress:
        found = bench(
            artifact,
            prompt=prompt,
            gen=gen,
            batch=batch,
            rounds=rounds,
            seed=seed,
            progress=progress,
            opener=load,
        )
    if as_json:
        import json

        print(json.dumps(vars(found)))
    else:
        print(report(found, batch))


def _draft(
    artifact: Path,
    draft: str,
    draft_tokens: str,
    text: Path | None,
    gen: int,
    rounds: int,
    as_json: bool,
) -> None:
    from smelt import load
    from smelt.runtime.measure_draft import PROMPTS, measure_draft, prompts_of

    from .generate import read_prompts

    texts = PROMPTS if text is None else read_prompts([], text)
    options = engine_options(None, None, draft, draft_tokens)
    with load(artifact, **options) as llm:
        found = measure_draft(llm, prompts_of(llm, texts), gen, rounds)
    if as_json:
        import json

        print(json.dumps({**vars(found), "speed_up": found.speed_up}))
    else:
        print(draft_report(found))


def draft_report(found: DraftMeasurement) -> str:
    """What drafting gained, as a few lines."""
    same = "the same" if found.same else "not all the same: logits that tie fall either way"
    return "\n".join(
        (
            f"with {found.drafter:<13} {found.tokens_per_s:.1f} tokens/s",
            f"without            {found.plain_tokens_per_s:.1f} tokens/s",
            f"speed-up           {found.speed_up:.2f}x",
            f"drafts accepted    {found.acceptance:.1%}",
            f"accepted length    {found.accepted_length:.2f} tokens a drafted step",
            f"steps with a draft {found.drafted_steps:.1%}",
            f"tokens             {same}",
        )
    )


def report(found: Measurement, batch: int) -> str:
    """The measurement as a few lines."""
    steps = "" if batch == 1 else f" ({found.decode_tokens_per_s / batch:.1f} steps/s)"
    return "\n".join(
        (
            f"prefill            {found.prefill_tokens_per_s:.1f} tokens/s",
            f"decode             {found.decode_tokens_per_s:.1f} tokens/s{steps}",
            f"first token after  {found.ttft_s * 1e3:.1f} ms",
            f"loading            {found.load_s:.2f} s",
            f"peak memory        {found.peak_rss_bytes / 2**20:.0f} MiB",
            f"weights a step     {found.weight_bytes_per_token / 1e6:.1f} MB",
            f"memory bandwidth   {found.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s",
            f"of the bound       {100 * found.bound_fraction:.1f} %",
        )
    )
