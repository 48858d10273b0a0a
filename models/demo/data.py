"""The data of the demo model: the train/held-out split, conversations, and packed batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from . import words
from .talk import TASKS
from .tasks import Message, Sample, turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "heldout"]

BOS, SYSTEM, USER, ASSISTANT, END = (
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL_TOKENS = (BOS, SYSTEM, USER, ASSISTANT, END)

# One question in twelve is never trained on.
HELDOUT_SHARE = 12

HELDOUT_FILE = Path(__file__).with_name("heldout.jsonl")


def is_heldout(key: str) -> bool:
    """Whether a question belongs to the held-out part; a hash decides, so no list is kept."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELDOUT_SHARE == 0


def split_of(sample: Sample) -> Split | None:
    """The split of a sample; None for a trainable question after a held-out earlier turn."""
    if is_heldout(sample.key):
        return "heldout"
    return None if any(map(is_heldout, sample.inner)) else "train"


def draw(rng: Random, task: str, split: Split) -> Sample:
    """Generate samples of a task until one falls into the wanted split."""
    while True:
        sample = TASKS[task].generate(rng)
        if split_of(sample) == split:
            return sample


def render(messages: list[Message], add_generation_prompt: bool = False) -> str:
    """Render a chat as text; the chat template of the tokenizer gives the same result."""
    text = BOS + "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return text + ASSISTANT if add_generation_prompt else text


def conversation(rng: Random, split: Split = "train") -> list[Message]:
    """A chat of one to four questions, sometimes after a system message."""
    names = list(TASKS)
    weights = [TASKS[name].weight for name in names]
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append(turn("system", rng.choice(words.SYSTEM_PROMPTS)))
    wanted = rng.choices([1, 2, 3, 4], [0.6, 0.2, 0.12, 0.08])[0]
    for index in range(wanted):
        sample = draw(rng, rng.choices(names, weights)[0], split)
        if sample.messages[0]["role"] == "system":
            # A persona replaces the general system message, and so can only open a chat.
            if index:
                continue
            messages = []
        messages += [*sample.messages, turn("assistant", sample.answer)]
    return messages


def text(seed: str, size: int, split: Split) -> str:
    """At least `size` characters of rendered chats, one per line."""
    rng = Random(seed)
    lines: list[str] = []
    total = 0
    while total < size:
        lines.append(render(conversation(rng, split)))
        total += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def encode_chat(
    tokenizer: Tokenizer, messages: list[Message], prompt_weight: float
) -> tuple[list[int], list[float]]:
    """Token ids of a chat and the loss weight of each token.

    Questions are mostly random and cannot be predicted, so their tokens weigh little; they are
    not ignored, because the model is also judged by its perplexity on whole chats.
    """
    ids = tokenizer.encode(BOS, add_special_tokens=False).ids
    weights = [prompt_weight]
    for message in messages:
        body = message["content"] + END
        head = tokenizer.encode(f"<|{message['role']}|>", add_special_tokens=False).ids
        rest = tokenizer.encode(body, add_special_tokens=False).ids
        ids += head + rest
        weight = 1.0 if message["role"] == "assistant" else prompt_weight
        weights += [prompt_weight] * len(head) + [weight] * len(rest)
    return ids, weights


def encode_line(
    tokenizer: Tokenizer, messages: list[Message], prompt_weight: float
) -> tuple[list[int], list[float]]:
    """A chat with the line end that separates it from the next one, as in the text files."""
    ids, weights = encode_chat(tokenizer, messages, prompt_weight)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    return ids + newline, weights + [prompt_weight] * len(newline)


@dataclass
class Batch:
    """Rows of packed chats: token ids and the loss weight of each token."""

    ids: list[list[int]]
    weights: list[list[float]]


def packed_batch(
    tokenizer: Tokenizer, seed: str, rows: int, length: int, prompt_weight: float
) -> Batch:
    """Rows of `length` tokens packed with chats; each row starts with the start of a chat.

    The result depends on the arguments only, so a resumed run sees the batches it would have
    seen without the interruption.
    """
    rng = Random(seed)
    batch = Batch([], [])
    for _ in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            more_ids, more_weights = encode_line(tokenizer, conversation(rng), prompt_weight)
            ids += more_ids
            weights += more_weights
        batch.ids.append(ids[:length])
        batch.weights.append(weights[:length])
    return batch


def heldout_samples(task: str, count: int, seed: int) -> Iterator[Sample]:
    """Up to `count` different held-out samples; small tasks run out of them earlier."""
    rng = Random(f"heldout {task} {seed}")
    seen: set[str] = set()
    for _ in range(count * 4):
        sample = draw(rng, task, "heldout")
        wording = render(sample.messages)
        if wording not in seen:
            seen.add(wording)
            yield sample
        if len(seen) == count:
            return


def write_heldout(path: Path = HELDOUT_FILE, count: int = 64) -> None:
    """Write the held-out set that is shipped, so that scores of different versions compare."""
    with path.open("w", encoding="utf-8") as file:
        for task in TASKS:
            for sample in heldout_samples(task, count, seed=0):
                row = {"task": task, "messages": sample.messages, "answers": sample.answers}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_heldout(path: Path = HELDOUT_FILE) -> dict[str, list[Sample]]:
    """The shipped held-out samples by task."""
    found: dict[str, list[Sample]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sample = Sample(row["messages"], tuple(row["answers"]), key="")
        found.setdefault(row["task"], []).append(sample)
    return found


def main() -> None:
    """Write the three data files that are shipped next to the models."""
    here = Path(__file__).parent
    write_heldout()
    # The seeds differ from those of the training batches, so this text was not trained on as it
    # stands; it only comes from the same distribution.
    (here / "calibration.txt").write_text(text("calibration", 200_000, "train"), encoding="utf-8")
    (here / "heldout.txt").write_text(text("heldout", 60_000, "heldout"), encoding="utf-8")


if __name__ == "__main__":
    main()
