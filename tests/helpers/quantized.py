"""Small programs at the point where quantization runs, with real weights, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import clone_program

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.trace import export, program_from_export
from smelt.compiler.weights import ModuleSource
from smelt.models.skeleton import build
from smelt.passes.program import Dialect, Program

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def config(name: str, **changes: Any) -> Any:
    """A tiny transformers configuration: config("Llama", num_key_value_heads=2)."""
    import transformers

    sizes: dict[str, Any] = {**BASE, "num_key_value_heads": 2}
    if name == "GPT2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    elif name == "GPTNeoX":
        sizes = dict(BASE)
    elif name == "Gemma2":
        sizes |= {"head_dim": 16, "query_pre_attn_scalar": 16}
    elif name == "OPT":
        sizes = {k: v for k, v in BASE.items() if k != "intermediate_size"}
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    return getattr(transformers, f"{name}Config")(**{**sizes, **changes})


def module(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random fp32 model whose norms and biases are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config(name, **changes), torch.float32, real=True)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            else:
                parameter.data *= 3
    return model


_TRACED: dict[tuple[object, ...], Program] = {}


def _kind(model: torch.nn.Module) -> tuple[object, ...]:
    """What a model's graph follows from: all but the values of its weights."""
    modules = tuple((name, type(part)) for name, part in model.named_modules())
    weights = tuple((name, p.shape, p.dtype) for name, p in model.named_parameters())
    return model.config.to_json_string(), modules, weights


def exported(model: torch.nn.Module) -> Program:
    """The model's program before any pass, traced once for all models of a kind."""
    key = _kind(model)
    if key not in _TRACED:
        _TRACED[key] = program_from_export(export(model), model, model.config)
    return clone_program(_TRACED[key])


def program_of(model: torch.nn.Module, opt: str = "O2") -> Program:
    """The model's program after the passes that run before quantization."""
    key = (*_kind(model), opt)
    if key not in _TRACED:
        program = exported(model)
        stages = pipeline(PipelineConfig(opt=opt))
        names = [stage.pass_.name for stage in stages]
        PassManager(stages[: names.index("keep-logits-rows")]).run(program)
        assert program.dialect is Dialect.SEMANTIC
        _TRACED[key] = program
    return clone_program(_TRACED[key])


def traced(name: str, **changes: Any) -> tuple[Program, ModuleSource]:
    model = module(name, **changes)
    return program_of(model), ModuleSource(model)


def weights_of(program: Program, source: Any) -> dict[str, torch.Tensor]:
    return dict(program.weights.materialize(program.used_weights(), source))


def logits(program: Program, source: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """float32 [T, V] a sequence."""
    weights = weights_of(program, source)
    out = []
    for sequence in sequences:
        ids = torch.tensor(sequence)
        result = program.run({"input_ids": ids, "position_ids": torch.arange(len(ids))}, weights)
        out.append((result[0] if isinstance(result, list | tuple) else result).float())
    return out


@dataclass(frozen=True)
class Score:
    """Quality against reference logits. own: perplexity of the reference's own distribution."""

    kl: float
    perplexity: float
    own: float


def score(
    found: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    sequences: Sequence[Sequence[int]],
) -> Score:
    p = torch.cat([x.log_softmax(-1) for x in reference])
    q = torch.cat([x.log_softmax(-1) for x in found])
    cross = -(p.exp() * q).sum(-1).mean()
    kl = cross + (p.exp() * p).sum(-1).mean()
    nll = torch.cat(
        [
            -x.log_softmax(-1)[:-1].gather(1, torch.tensor(s)[1:, None])[:, 0]
            for x, s in zip(found, sequences, strict=True)
        ]
    ).mean()
    return Score(float(kl), float(nll.exp()), float(cross.exp()))


def random_ids(count: int, length: int, vocabulary: int = 128, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    return [list(map(int, row)) for row in ids]


@lru_cache(maxsize=4)
def checkpoint(folder: Path) -> torch.nn.Module:
    """A trained model of the shared data."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_ids(folder: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """`count` sequences of `length` tokens from the beginning of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[: count * length * 6])
    assert len(ids) >= count * length
    return [ids[i * length : (i + 1) * length] for i in range(count)]
