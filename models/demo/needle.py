"""The needle of the demo model: its own "recall" task, with other questions in between.

A user says which animal they have; after many other turns they ask. The haystack is the held-out
set, so the model has seen none of it.
"""

from __future__ import annotations

from random import Random

from smelt.runtime.needle import Haystack, Needle

from .data import BOS, read_heldout, render
from .tasks import article, turn
from .words import ANIMALS

# These tasks state facts of the same kind.
LEFT_OUT = ("recall", "persona", "small_talk")


def haystack() -> Haystack:
    """Chats as text, special tokens written out, for `smelt.runtime.needle.retrieval`."""
    chats = [
        render([*sample.messages, turn("assistant", sample.answer)]).removeprefix(BOS)
        for task, samples in read_heldout().items()
        for sample in samples
        if task not in LEFT_OUT
    ]
    Random(0).shuffle(chats)
    return Haystack("demo", tuple(chats), _draw, head=BOS, special=False)


def _draw(rng: Random) -> Needle:
    animal = article(rng.choice(ANIMALS))
    told = [turn("user", f"I have {animal}."), turn("assistant", f"How nice, {animal}!")]
    asked = render([turn("user", "Which animal do I have?")], add_generation_prompt=True)
    return Needle(
        render(told).removeprefix(BOS), asked.removeprefix(BOS), f"You have {animal}.<|end|>"
    )
