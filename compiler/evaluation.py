"""The original model as a reference for evaluation: eager transformers, nothing of ours in it."""

from __future__ import annotations

import os
from typing import Any

import torch

from smelt.models.checkpoint import Checkpoint
from smelt.models.config import load_config, max_positions
from smelt.models.folder import resolve
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.tokenizer import Tokenizer

from .options import DTYPES


class EagerModel:
    """A Hugging Face causal LM run by transformers, one window at a time and without a cache.

    model: folder or hub name. dtype: "fp32" (the reference), or "auto" for the checkpoint's own.
    Raises UserError for a folder that is no such model and for damaged weights.
    """

    def __init__(
        self, model: str | os.PathLike[str], dtype: str = "fp32", trust_remote_code: bool = False
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if dtype not in ("auto", *DTYPES):
            known = ", ".join(("auto", *DTYPES))
            raise UserError(f"--against-dtype {dtype}: expected one of {known}")
        self.folder = resolve(model)
        config = load_config(self.folder, trust_remote_code)
        Checkpoint(self.folder)  # names a truncated or missing file in one line
        logging.disable_progress_bar()
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype="auto" if dtype == "auto" else getattr(torch, DTYPES[dtype]),
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            ).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            line = str(error).strip().split("\n")[0]
            raise SmeltError(f"{self.folder}: transformers cannot load it: {line}") from error
        self.vocab_size = int(config.vocab_size)
        self.context = max_positions(config)

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer; None where it has none of the fast form."""
        return Tokenizer(self.folder) if (self.folder / "tokenizer.json").is_file() else None

    def logits(self, windows: list[list[int]]) -> list[torch.Tensor]:
        """One [len, V] tensor a window, in the model's dtype."""
        with torch.no_grad():
            return [
                self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
                for tokens in windows
            ]
