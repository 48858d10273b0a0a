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
    draft: str | Path,
    program: StepProgram,
    tokenizer: Tokenizer,
    deterministic: bool = False,
    cuda_graphs: bool = True,
) -> Drafter:
    """`ngram`, `medusa:FOLDER`, `eagle3:FOLDER`, or the folder of an artifact whose tokens mean
    what the model's mean.

    program, tokenizer: the model's; deterministic: sampled answers, too, are to be those without a
    draft; cuda_graphs: as in `EngineOptions`. Raises `UserError` for a name that is not known, for
    a draft with another vocabulary, and for heads of a model without their features.
    """
    if str(draft) == "ngram":
        from .ngram import NgramDrafter

        return NgramDrafter()
    kind, _, heads = str(draft).partition(":")
    if heads and kind in ("medusa", "eagle3"):
        where = Path(heads).expanduser()
        if not where.is_dir():
            raise UserError(f"--draft {draft}: {heads} is no folder of heads")
        if kind == "medusa":
            from .medusa import open_medusa

            return open_medusa(where, program)
        from .eagle3 import open_eagle3

        return open_eagle3(where, program)
    folder = Path(draft)
    if not folder.is_dir():
        raise UserError(
            f"--draft {draft} is no folder: give ngram, medusa:FOLDER, eagle3:FOLDER, or the "
            "artifact of a smaller model"
        )
    from ..artifact import open_artifact
    from ..tokenizer import Tokenizer as Reader
    from .model import ModelDrafter

    smaller = open_artifact(folder)
    check_vocabulary(Reader(smaller.folder), tokenizer, str(draft))
    return ModelDrafter(smaller.program, program.vocab_size, deterministic, cuda_graphs)


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
