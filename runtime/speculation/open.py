"""From `--draft` to a drafter that fits the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .drafter import Drafter

if TYPE_CHECKING:
    from ..engine import StepProgram
    from ..tokenizer import Tokenizer


def open_drafter(
    draft: str | Path, program: StepProgram, tokenizer: Tokenizer, deterministic: bool = False
) -> Drafter:
    """`ngram`, or the folder of an artifact whose tokens mean what the model's mean.

    program, tokenizer: the model's; deterministic: sampled answers, too, are to be those without a
    draft. Raises `UserError` for a name that is not known and for a
    draft with another vocabulary.
    """
    if str(draft) == "ngram":
        from .ngram import NgramDrafter

        return NgramDrafter()
    folder = Path(draft)
    if not folder.is_dir():
        raise UserError(
            f"--draft {draft} is no folder: give ngram, or the artifact of a smaller model"
        )
    from ..artifact import open_artifact
    from ..tokenizer import Tokenizer as Reader
    from .model import ModelDrafter

    smaller = open_artifact(folder)
    check_vocabulary(Reader(smaller.folder), tokenizer, str(draft))
    return ModelDrafter(smaller.program, program.vocab_size, coupled=deterministic)


def check_vocabulary(draft: Tokenizer, model: Tokenizer, name: str) -> None:
    """Raise `UserError` unless every token id stands for the same text in both."""
    ours, theirs = model.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    different = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    raise UserError(
        f"--draft {name} has another vocabulary ({len(different)} of {len(ours)} tokens differ): "
        "a draft must use the model's own tokens"
    )
