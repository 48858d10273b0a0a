"""`smelt chat OUT`: a conversation in the terminal, or line by line through pipes.

When the conversation outgrows the model's context, the oldest turns are left out of the prompt
and a notice says so; the system message stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from smelt.runtime.errors import SmeltError, UserError

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
    Stop,
    Temperature,
    TopK,
    TopP,
    engine_options,
    structured,
)

if TYPE_CHECKING:
    from smelt.runtime.chat_session import ChatSession
    from smelt.runtime.metrics import Metrics

    from .console import Console

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation (the system message stays)",
    "/system TEXT": "set the system message; without TEXT remove it",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "continue a saved conversation",
    "/stats": "tokens computed, found in the cache, and speed",
    "/exit": "quit (also Ctrl-D); Ctrl-C stops an answer",
}


def command(
    artifact: Artifact,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--system", help="System message.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--max-tokens",
            "-n",
            help="Most tokens of an answer; default: what the context holds.",
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", help="Repeatable answers.", show_default=False),
    ] = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choice = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = "auto",
    deterministic: Deterministic = False,
    kv_cache_tokens: CacheTokens = None,
    kv_cache_fraction: CacheFraction = None,
) -> None:
    """Talk with an artifact. /help in the chat lists its commands."""
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
        structured=structured(json_schema, regex, grammar, choice),
    )
    options = engine_options(kv_cache_tokens, kv_cache_fraction, draft, draft_tokens, deterministic)
    from smelt import load
    from smelt.runtime.chat_session import ChatSession

    from .console import open_console

    with load(artifact, **options) as llm:
        session = ChatSession(llm, system=system, params=params)
        console = open_console(name.split()[0] for name in HELP)
        if not session.templated:
            console.notice(
                "This model has no chat template: it continues your text as plain completion."
            )
        talk(session, console)


def talk(session: ChatSession, console: Console) -> None:
    """Read, answer, repeat; an error ends the turn and not the chat."""
    while (line := console.read()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not run_command(line, session, console):
                    return
                continue
            turn = session.send(line)
            if turn.dropped:
                console.notice(
                    f"(the context is full: the {turn.dropped} oldest messages are left out; "
                    "/reset starts anew)"
                )
            console.answer(turn)
        except SmeltError as error:
            console.notice(f"smelt: {error}")


def run_command(line: str, session: ChatSession, console: Console) -> bool:
    """Carry out a /command; False if it ends the chat."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        width = max(map(len, HELP)) + 2
        console.say("\n".join(f"{key:<{width}}{text}" for key, text in HELP.items()))
    elif name == "/reset":
        session.reset()
        console.say("conversation forgotten")
    elif name == "/system":
        session.set_system(argument)
        console.say("system message set" if argument else "system message removed")
    elif name == "/save":
        session.save(_file(name, argument))
        console.say(f"{len(session.messages)} messages written to {argument}")
    elif name == "/load":
        session.load(_file(name, argument))
        console.say(f"{len(session.messages)} messages read from {argument}")
    elif name == "/stats":
        console.say(stats_text(session))
    else:
        raise UserError(f"{name} is no command: /help lists them")
    return True


def _file(name: str, argument: str) -> Path:
    if not argument:
        raise UserError(f"{name} needs a file name, as in {name} talk.json")
    return Path(argument).expanduser()


def stats_text(session: ChatSession) -> str:
    """The counters of a conversation, a line each."""
    stats, metrics = session.stats, session.llm.engine.metrics
    return "\n".join(
        (
            f"turns: {stats.turns}",
            f"prompt tokens prefilled: {stats.prefilled_tokens}",
            f"prompt tokens reused from the cache: {stats.reused_tokens}",
            f"tokens generated: {stats.generated_tokens}",
            f"messages dropped: {stats.dropped_messages}",
            f"last answer: first token after {stats.ttft_s * 1e3:.0f} ms, "
            f"{stats.decode_tokens_per_s:.1f} tokens/s",
            f"cache blocks: {metrics.blocks - metrics.free_blocks} of {metrics.blocks} in use",
            *draft_lines(metrics),
        )
    )


def draft_lines(metrics: Metrics) -> list[str]:
    """What drafting gave, if there was any."""
    if not metrics.drafted_tokens:
        return []
    return [
        f"drafted: {metrics.drafted_tokens} tokens, {metrics.acceptance:.0%} accepted, "
        f"{metrics.accepted_length:.2f} tokens a drafted step"
    ]
