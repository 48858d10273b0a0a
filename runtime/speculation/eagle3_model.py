"""The draft network of EAGLE-3 (Li et al. 2025, arXiv:2503.01840): one decoder layer.

It reads pairs of a hidden row and the token behind it. The hidden row of a known token is made of
the model's features, that of a drafted one is the network's own last output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..errors import UserError
from .heads import Weights, check_features, model_weight, number, read_config, read_weights

if TYPE_CHECKING:
    from ..engine_options import StepProgram


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes: `hidden` K of the network, `heads` and `kv_heads` of `head_size` D, `inner` I of the
    gated MLP, `vocab` V of the model, `drafts` of the network, `features` F of the model's rows.
    eps: of the norms; frequencies: float32 [D / 2], the rotary angles a position."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    drafts: int
    features: int
    eps: float
    frequencies: torch.Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight the network must have, by the names of the authors' checkpoints."""
        k, d = self.hidden, self.head_size
        layer = {
            "self_attn.q_proj": (self.heads * d, 2 * k),
            "self_attn.k_proj": (self.kv_heads * d, 2 * k),
            "self_attn.v_proj": (self.kv_heads * d, 2 * k),
            "self_attn.o_proj": (k, self.heads * d),
            "mlp.gate_proj": (self.inner, k),
            "mlp.up_proj": (self.inner, k),
            "mlp.down_proj": (k, self.inner),
            "hidden_norm": (k,),
            "input_layernorm": (k,),
            "post_attention_layernorm": (k,),
        }
        found: dict[str, tuple[int, ...]] = {f"midlayer.{n}.weight": s for n, s in layer.items()}
        found |= {"fc.weight": (k, self.features), "norm.weight": (k,)}
        return found | {"lm_head.weight": (self.drafts, k)}


class Context:
    """Keys and values [G, capacity, D] of one sequence; the first `length` positions count."""

    def __init__(self) -> None:
        self.length = 0
        self._kv: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [n, G, D] each; all keys and values so far, [G, length, D]."""
        end = self.length + len(k)
        if self._kv is None or self._kv.shape[2] < end:
            grown = k.new_empty(2, k.shape[1], max(2 * end, 64), k.shape[2])
            if self._kv is not None:
                grown[:, :, : self.length] = self._kv[:, :, : self.length]
            self._kv = grown
        self._kv[0, :, self.length : end] = k.transpose(0, 1)
        self._kv[1, :, self.length : end] = v.transpose(0, 1)
        self.length = end
        return self._kv[0, :, :end], self._kv[1, :, :end]


class Eagle3Model:
    """weights: of `Eagle3Config.shapes`; embedding: [V, K]; targets: int64 [drafts], the model's
    token of each of the network's, None where they are the same."""

    def __init__(
        self,
        config: Eagle3Config,
        weights: Mapping[str, torch.Tensor],
        embedding: torch.Tensor,
        targets: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        self.embedding, self.targets = embedding, targets
        self._weights = weights

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Hidden rows [n, K] from the model's features [n, F]."""
        weight = self._weights["fc.weight"]
        return functional.linear(features.to(weight.dtype), weight)

    def step(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        parts: Sequence[tuple[Context, int]],
    ) -> torch.Tensor:
        """New hidden rows [N, K] for pairs packed end to end.

        hidden: [N, K]; tokens: int64 [N], those behind them; positions: int64 [N]. parts: whose
        they are: contexts, which grow, and how many of the N each gets.
        """
        embedded = functional.embedding(tokens, self.embedding).to(hidden.dtype)
        both = torch.cat(
            [self._norm(embedded, "input_layernorm"), self._norm(hidden, "hidden_norm")], -1
        )
        hidden = hidden + self._attention(both, positions, parts)
        x = self._norm(hidden, "post_attention_layernorm")
        gated = functional.silu(self._linear(x, "mlp.gate_proj")) * self._linear(x, "mlp.up_proj")
        return hidden + self._linear(gated, "mlp.down_proj")

    def best(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's token [n] that the network thinks most likely behind each hidden row."""
        chosen = self.logits(hidden).argmax(-1)
        return chosen if self.targets is None else self.targets[chosen]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Over the network's own vocabulary, [n, drafts]."""
        x = _rms(hidden, self._weights["norm.weight"], self.config.eps)
        return functional.linear(x, self._weights["lm_head.weight"])

    def _attention(
        self, x: torch.Tensor, positions: torch.Tensor, parts: Sequence[tuple[Context, int]]
    ) -> torch.Tensor:
        size = self.config.head_size
        angles = positions[:, None].float() * self.config.frequencies
        cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
        q, k, v = (
            self._linear(x, f"self_attn.{name}_proj").view(len(x), -1, size) for name in "qkv"
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out, at = [], 0
        for context, count in parts:
            mine = slice(at, at + count)
            keys, values = context.append(k[mine], v[mine])
            mask = None
            if count > 1:
                mask = torch.ones(count, keys.shape[1], dtype=torch.bool, device=x.device)
                mask = mask.tril(keys.shape[1] - count)
            attended = functional.scaled_dot_product_attention(
                q[mine].transpose(0, 1)[None], keys[None], values[None], mask, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1).reshape(count, -1))
            at += count
        return self._linear(torch.cat(out), "self_attn.o_proj")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self._weights[f"midlayer.{name}.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return _rms(x, self._weights[f"midlayer.{name}.weight"], self.config.eps)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in halves, as Llama has them. x: [N, heads, D]; cos, sin: [N, 1, D]."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rotary_frequencies(config: Mapping[str, Any], size: int, folder: Path) -> torch.Tensor:
    """Angles a position, float32 [size / 2]; plain, linear and llama3 scaling.

    Raises `UserError` for other scalings and for numbers that are none.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{folder}/config.json: rope_scaling is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        base = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        plain: torch.Tensor = base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        if kind == "default":
            return plain
        factor = float(rope["factor"])
        if kind == "linear":
            return plain / factor
        if kind == "llama3":
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            turns = float(rope["original_max_position_embeddings"]) * plain / (2 * math.pi)
            # Slow turns are stretched by the factor, fast ones kept, the others lie between.
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return plain * (kept + (1 - kept) / factor)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}/config.json: rotary scaling: {error!r} is missing or wrong"
        ) from error
    raise UserError(f"{folder}/config.json: rotary scaling {kind!r} is not supported")


def load_eagle3(folder: Path, program: StepProgram) -> Eagle3Model:
    """The network of a Hugging Face folder of LlamaForCausalLMEagle3.

    Weights are in model.safetensors or pytorch_model.bin. `d2t` [drafts] holds what to add to a
    token of the network to get the model's; without `embed_tokens` the model's own embedding is
    used. Raises `UserError` for what is missing or does not fit the model.
    """
    draft = f"eagle3:{folder}"
    width = check_features(program, "eagle3", draft)
    raw = read_config(folder)
    weights = Weights(
        read_weights(folder, "model.safetensors", "pytorch_model.bin"), folder, program.device
    )
    config = _config(raw, weights.rows("lm_head.weight"), width, folder, program.device)
    if config.vocab != program.vocab_size:
        raise UserError(
            f"--draft {draft} has another vocabulary: {config.vocab} tokens, "
            f"not {program.vocab_size}"
        )
    if weights.columns("fc.weight") != width:
        raise UserError(
            f"--draft {draft} reads features of width {weights.columns('fc.weight')}, "
            f"this model's are {width} wide"
        )
    taken = {name: weights.take(name, *shape) for name, shape in config.shapes().items()}
    if "embed_tokens.weight" in weights:
        embedding = weights.take("embed_tokens.weight", config.vocab, config.hidden)
    else:
        embedding = model_weight(program, "embedding", draft)
        if embedding.shape[1] != config.hidden:
            raise UserError(
                f"--draft {draft} is {config.hidden} wide, the model's embedding "
                f"{embedding.shape[1]}, and it has none of its own"
            )
    return Eagle3Model(config, taken, embedding, _targets(weights, config, folder))


def _config(
    raw: Mapping[str, Any], drafts: int, width: int, folder: Path, device: torch.device
) -> Eagle3Config:
    hidden, heads = (number(raw, name, folder) for name in ("hidden_size", "num_attention_heads"))
    size = number(raw, "head_dim", folder) if raw.get("head_dim") else hidden // heads
    groups = {"num_key_value_heads": heads, **raw}
    kv_heads = number(groups, "num_key_value_heads", folder)
    if heads % kv_heads or size % 2:
        raise UserError(f"{folder}/config.json: {heads} heads of {size} do not fit {kv_heads}")
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int):
        raise UserError(f"{folder}/config.json: rms_norm_eps is {eps!r}, not a number")
    if number({"draft_vocab_size": drafts, **raw}, "draft_vocab_size", folder) != drafts:
        raise UserError(
            f"{folder}: draft_vocab_size is {raw['draft_vocab_size']}, lm_head has {drafts} rows"
        )
    return Eagle3Config(
        hidden,
        heads,
        kv_heads,
        size,
        number(raw, "intermediate_size", folder),
        number(raw, "vocab_size", folder),
        drafts,
        width,
        float(eps),
        rotary_frequencies(raw, size, folder).to(device),
    )


def _targets(weights: Weights, config: Eagle3Config, folder: Path) -> torch.Tensor | None:
    if "d2t" not in weights:
        if config.drafts != config.vocab:
            raise UserError(f"{folder}: there is no weight d2t for {config.drafts} drafted tokens")
        return None
    offsets = weights.take("d2t", config.drafts)
    if offsets.dtype.is_floating_point or offsets.dtype == torch.bool:
        raise UserError(f"{folder}: d2t holds no whole numbers")
    targets = offsets.long() + torch.arange(config.drafts, device=offsets.device)
    if int(targets.min()) < 0 or int(targets.max()) >= config.vocab:
        raise UserError(f"{folder}: d2t leads to tokens outside of the vocabulary")
    return targets
