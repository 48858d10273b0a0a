"""Mixtures of experts as checkpoints hold them: every expert's gate, up and down a linear apart."""

from __future__ import annotations

import re
from typing import Any

import torch
from helpers.quantized import module

EXPERTS, TOP = 4, 2
SIZES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 96},
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 96, "head_dim": 16},
}
# The names of gate, up and down, and of the module around the experts.
NAMES = {
    "mixtral": ("w1", "w3", "w2", "block_sparse_moe"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj", "mlp"),
}
_STACKED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")


def mixture(family: str = "Mixtral", layers: int = 1, **changes: Any) -> torch.nn.Module:
    """A random tiny model of FAMILY, one of SIZES."""
    sizes = {"num_hidden_layers": layers, "num_experts_per_tok": TOP, **SIZES[family], **changes}
    return module(family, **sizes)


def expert_path(model: Any, layer: int, e: int, part: str) -> str:
    """The module path of an expert's "gate", "up" or "down" in a checkpoint."""
    *leaves, around = NAMES[model.config.model_type]
    leaf = leaves[("gate", "up", "down").index(part)]
    return f"model.layers.{layer}.{around}.experts.{e}.{leaf}"


def apart(model: Any) -> dict[str, torch.Tensor]:
    """The experts' linears of a model, each [N, K], by module path in a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        experts = getattr(block.mlp, "experts", None)
        for e in range(len(experts.down_proj) if experts is not None else 0):
            gate, up = experts.gate_up_proj[e].detach().chunk(2)
            whole = {"gate": gate, "up": up, "down": experts.down_proj[e].detach()}
            found |= {expert_path(model, layer, e, part): w for part, w in whole.items()}
    return found


def renamed(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state as a checkpoint has it, without the stacked experts."""
    around = NAMES.get(model.config.model_type, ("mlp",))[-1]
    kept = {name: value for name, value in state.items() if not _STACKED.fullmatch(name)}
    return {name.replace(".mlp.gate.", f".{around}.gate."): v for name, v in kept.items()}


def put(model: Any, path: str, weight: torch.Tensor) -> None:
    """Set one expert's linear of a model, named as `apart` does."""
    words = path.split(".")
    layer, e, leaf = int(words[2]), int(words[-2]), words[-1]
    part = NAMES[model.config.model_type].index(leaf)
    experts = model.model.layers[layer].mlp.experts
    if part == 2:
        experts.down_proj.data[e] = weight
    else:
        experts.gate_up_proj.data[e].chunk(2)[part].copy_(weight)
