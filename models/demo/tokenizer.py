"""The tokenizer of the demo models: a byte-level BPE trained on generated chats.

    python -m smelt.models.demo.tokenizer

writes it into the folders of both models. Every digit is a token of its own, because sums are
learnt far sooner when the columns of a number line up with tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .data import ASSISTANT, BOS, END, SPECIAL_TOKENS, conversation

VOCAB_SIZE = 1024

# Words with their leading blank, single digits, runs of other signs, then blanks.
SPLIT_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def train_tokenizer(chats: int = 30000, seed: int = 0) -> Tokenizer:
    """Train the BPE on the text of generated chats."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(f"tokenizer {seed}")
    contents = (m["content"] for _ in range(chats) for m in conversation(rng))
    tokenizer.train_from_iterator(contents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers reads a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": BOS, "eos_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", specials)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the tokenizer and save it for both models."""
    tokenizer = train_tokenizer()
    for name in ("smelt-demo", "smelt-demo-draft"):
        save(tokenizer, Path(__file__).parent / name)


if __name__ == "__main__":
    main()
