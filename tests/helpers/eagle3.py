"""EAGLE-3 networks for tests: random ones, and the same network out of transformers' parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.fake_step import HIDDEN, FakeStep
from safetensors.torch import save_file
from torch import nn

from smelt.runtime.speculation.eagle3_model import Eagle3Model, load_eagle3

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 97,
    "draft_vocab_size": 40,
}


def random_weights(seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """Weights for `CONFIG`, float32; every second token of the model is one of the network."""
    c = {**CONFIG, **config}
    make = torch.Generator().manual_seed(seed)
    k, inner = c["hidden_size"], c["intermediate_size"]
    kv = k // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {
        "fc.weight": (k, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": (k, 2 * k),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * k),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * k),
        "midlayer.self_attn.o_proj.weight": (k, k),
        "midlayer.mlp.gate_proj.weight": (inner, k),
        "midlayer.mlp.up_proj.weight": (inner, k),
        "midlayer.mlp.down_proj.weight": (k, inner),
        "lm_head.weight": (c["draft_vocab_size"], k),
    }
    found = {n: torch.randn(s, generator=make) / s[1] ** 0.5 for n, s in shapes.items()}
    for name in (
        *("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"),
        "norm",
    ):
        found[f"{name}.weight"] = 1 + 0.2 * torch.randn(k, generator=make)
    found["d2t"] = torch.arange(c["draft_vocab_size"])
    found["t2d"] = torch.arange(c["vocab_size"]) % 2 == 0
    return found


def write_folder(path: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights, path / "model.safetensors")
    return path


def random_model(path: Path, step: FakeStep, seed: int = 0, **config: Any) -> Eagle3Model:
    return load_eagle3(write_folder(path, random_weights(seed, **config), **config), step)


class Reference(nn.Module):
    """The layer as the paper draws it, of transformers' own attention, MLP, norms and rotation."""

    def __init__(self, weights: dict[str, torch.Tensor], **config: Any) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import (
            LlamaAttention,
            LlamaMLP,
            LlamaRMSNorm,
            LlamaRotaryEmbedding,
        )

        super().__init__()
        c = {**CONFIG, **config}
        c.pop("architectures")
        llama = LlamaConfig(**c, attn_implementation="eager")
        k = llama.hidden_size
        self.fc = nn.Linear(3 * HIDDEN, k, bias=False)
        layer = nn.Module()
        layer.self_attn = LlamaAttention(llama, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            width = getattr(layer.self_attn, name).out_features
            setattr(layer.self_attn, name, nn.Linear(2 * k, width, bias=False))
        layer.mlp = LlamaMLP(llama)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, LlamaRMSNorm(k, llama.rms_norm_eps))
        self.midlayer = layer
        self.norm = LlamaRMSNorm(k, llama.rms_norm_eps)
        self.lm_head = nn.Linear(k, c["draft_vocab_size"], bias=False)
        self.rotary = LlamaRotaryEmbedding(llama)
        wanted = {name: value for name, value in weights.items() if name not in ("d2t", "t2d")}
        missing = self.load_state_dict(wanted, strict=False)
        assert not missing.unexpected_keys
        assert all("rotary" in name for name in missing.missing_keys)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """hidden, embedded: [n, K] of a whole sequence from position 0; hidden rows [n, K]."""
        hidden, embedded = hidden[None], embedded[None]
        n, layer = hidden.shape[1], self.midlayer
        both = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        rotation = self.rotary(hidden, torch.arange(n)[None])
        hidden = hidden + layer.self_attn(both, rotation, mask)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(hidden))
