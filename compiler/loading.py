"""What is compiled, before it is traced: skeleton, configuration, and where its weights are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.models.checkpoint import Checkpoint
from smelt.models.config import load_config
from smelt.models.folder import read_json, resolve
from smelt.models.skeleton import build
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import UserError

from .options import DTYPES, CompileOptions
from .stored import StoredModel, read_stored
from .weights import ModuleSource, checkpoint_specs, stored_dtype


@dataclass
class Loaded:
    """A model before it is traced: skeleton, configuration, where its weights are.

    quantized: what the checkpoint holds quantized already.
    """

    name: str
    folder: Path | None
    config: Any
    skeleton: nn.Module
    source: TensorSource
    stored: dict[str, Any]
    generation: dict[str, Any]
    quantized: StoredModel | None = None


def load(model: str | os.PathLike[str] | nn.Module, settings: CompileOptions) -> Loaded:
    """Read `model` (folder, hub name, or a transformers module), no weight yet.

    Raises UserError for what is no causal LM, is damaged, or has a tokenizer of another model.
    """
    if isinstance(model, nn.Module):
        source = ModuleSource(model)
        config = getattr(model, "config", None)
        if config is None:
            raise UserError(f"{type(model).__name__} has no transformers configuration")
        dtype = _dtype(settings.dtype, next(model.parameters()).dtype)
        skeleton = build(config, dtype, real=False, trust_remote_code=settings.trust_remote_code)
        generation = getattr(model, "generation_config", None)
        given = generation.to_dict() if generation is not None else {}
        return Loaded(type(model).__name__, None, config, skeleton, source, source.specs, given)
    folder = resolve(model, settings.revision)
    config = load_config(folder, settings.trust_remote_code)
    checkpoint = Checkpoint(folder)
    stored = checkpoint_specs(checkpoint)
    quantized = read_stored(folder, checkpoint, settings.spec)
    plain = quantized.plain(stored) if quantized else stored
    dtype = _dtype(settings.dtype, stored_dtype(plain))
    skeleton = build(config, dtype, real=False, trust_remote_code=settings.trust_remote_code)
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.is_file() else {}
    _check_vocabulary(folder, int(config.vocab_size))
    if quantized:
        quantized.check(checkpoint, skeleton, str(folder))
    name = os.fspath(model)
    return Loaded(name, folder, config, skeleton, checkpoint, stored, generation_config, quantized)


def _dtype(asked: str, stored: torch.dtype) -> torch.dtype:
    return stored if asked == "auto" else getattr(torch, DTYPES[asked])


def _check_vocabulary(folder: Path, size: int) -> None:
    """Raise UserError when the tokenizer gives ids that the model has no embedding for."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    data = read_json(path)
    vocab = (data.get("model") or {}).get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
    ids = [*ids, *(t["id"] for t in data.get("added_tokens") or [])]
    highest = max((i for i in ids if isinstance(i, int)), default=-1)
    if highest >= size:
        raise UserError(
            f"{folder}: tokenizer.json has token id {highest}, the model's vocabulary ends at "
            f"{size - 1}; the tokenizer belongs to another model"
        )
