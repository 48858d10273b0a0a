"""`smelt eval --needle`: its options, its haystacks, and the grid as lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from smelt.runtime.errors import UserError

from .progress import counting

if TYPE_CHECKING:
    from smelt.runtime.llm import LLM
    from smelt.runtime.needle import Haystack, Retrieval

KINDS = ("passkey", "repeat", "demo")


def check(kind: str) -> None:
    """Raise UserError for a kind of needle that there is not."""
    if kind not in KINDS:
        raise UserError(f"--needle {kind}: expected one of {', '.join(KINDS)}")


def ask(
    llm: LLM,
    kind: str,
    text: str | None,
    lengths: str | None,
    depths: str | None,
    trials: int,
    seed: int,
) -> Retrieval:
    """The grid of an artifact. text: the haystack; lengths, depths: "256,512" and "0,50,100"."""
    from smelt.runtime.needle import DEPTHS, default_lengths, retrieval

    if trials < 1:
        raise UserError(f"--needle-trials is {trials}: give 1 or more")
    shares: tuple[float, ...] = DEPTHS
    if depths is not None:
        shares = tuple(n / 100 for n in _numbers("--needle-depths", depths, 0, 100, "percent"))
    capacity = llm.engine.capacity
    sizes = default_lengths(capacity)
    if lengths is not None:
        sizes = _numbers("--needle-lengths", lengths, 2, capacity, "tokens (context, KV cache)")
    haystack = _haystack(llm, kind, text)
    with counting("asking for needles") as progress:
        return retrieval(haystack, llm.tokenizer, llm.logits, sizes, shares, trials, seed, progress)


def _haystack(llm: LLM, kind: str, text: str | None) -> Haystack:
    from smelt.runtime.haystack import passkey, repeat

    if kind == "demo":
        from smelt.models.demo import needle
        from smelt.models.demo.evaluate import check_artifact

        check_artifact(llm)
        return needle.haystack()
    if text is None:
        from smelt.compiler.calibration_data import BUILTIN

        text = BUILTIN.read_text(encoding="utf-8")
    return repeat(text) if kind == "repeat" else passkey(text, llm.tokenizer.chat_template)


def _numbers(name: str, text: str, low: int, high: int, unit: str) -> tuple[int, ...]:
    numbers = []
    for word in text.split(","):
        if not word.strip().isdecimal() or not low <= int(word) <= high:
            raise UserError(f"{name} {text}: give {low} to {high} {unit}, separated by commas")
        numbers.append(int(word))
    return tuple(numbers)


def report(found: Retrieval) -> str:
    """The grid as lines: what is found, and under it the gain."""
    lengths = list(dict.fromkeys(cell.length for cell in found.cells))
    depths = list(dict.fromkeys(cell.depth for cell in found.cells))
    cells = {(cell.length, cell.depth): cell for cell in found.cells}

    def grid(name: str, show: Callable[[float], str]) -> list[str]:
        return [
            f"  {length:>7} tokens "
            + "".join(f"{show(getattr(cells[length, depth], name)):>8}" for depth in depths)
            for length in lengths
        ]

    head = "".join(f"{f'{100 * depth:.0f} %':>8}" for depth in depths)
    return "\n".join(
        [
            f"needles found        {100 * found.mean('found'):.1f} %",
            f"gain                 {found.mean('gain'):.3f} nats a token",
            f"{'found, by depth':<17}{head}",
            *grid("found", lambda x: f"{100 * x:.0f} %"),
            f"{'gain, by depth':<17}{head}",
            *grid("gain", lambda x: f"{x:.3f}"),
            f"protocol: {found.protocol}",
        ]
    )
