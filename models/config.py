"""Configurations: what transformers knows of a model before its weights are read."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

from smelt.runtime.errors import UserError

from .folder import read_json
from .quantized import describe


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a causal language model in `folder`, unquantized.

    Raises UserError for a broken config.json, for code in the folder without trust_remote_code, for
    a quantization that smelt does not read (`quantized.describe`), and for an architecture that is
    no decoder-only causal LM (encoders, encoder-decoders, vision).
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    raw = read_json(folder / "config.json")
    if raw.get("auto_map") and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if raw.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"{folder} brings its own Python code ({', '.join(raw['auto_map'].values())}); "
                "read it, then pass --trust-remote-code"
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}/config.json: {line}") from error
    name = (config.architectures or ["?"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder}: {name} is an encoder-decoder; smelt compiles decoder-only models"
        )
    describe(raw, str(folder))
    if hasattr(config, "quantization_config"):
        # The module is traced as the plain architecture; the checkpoint's packed tensors come in
        # where its weights are bound.
        del config.quantization_config
    custom = trust_remote_code and "AutoModelForCausalLM" in (raw.get("auto_map") or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not custom:
        text = getattr(config, "text_config", None)
        if text is not None and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"{folder}: {name} is multimodal; smelt compiles text-only models")
        raise UserError(f"{folder}: {name} has no causal language model in transformers")
    architectures = config.architectures or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise UserError(
            f"{folder}: {name} is not a causal language model; smelt needs ...ForCausalLM"
        )
    return config


def rope_dicts(config: Any) -> list[dict[str, Any]]:
    """A configuration's rotary parameters: one dictionary, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict):
            return [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    return []


def max_positions(config: Any) -> int:
    """The context length of a configuration, in tokens, position scaling included.

    Linear (Chen et al. 2023, arXiv:2306.15595), dynamic NTK and YaRN scaling stretch the length of
    training by their factor, and configurations by convention leave `max_position_embeddings` at
    that length; longrope and llama3 name the stretched length there, and so does a configuration
    with parameters for each type of layer.
    """
    length = _positions(config)
    dicts = rope_dicts(config)
    if len(dicts) != 1 or not isinstance(dicts[0].get("factor"), int | float):
        return length
    kind, factor = dicts[0].get("rope_type", dicts[0].get("type")), float(dicts[0]["factor"])
    if kind in ("linear", "dynamic", "yarn"):
        trained = dicts[0].get("original_max_position_embeddings") or length
        return max(length, int(trained * factor))
    return length


def _positions(config: Any) -> int:
    for name in (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_sequence_length",
        "seq_length",
    ):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def eos_ids(config: Any, generation: dict[str, Any]) -> list[int]:
    """End-of-sequence ids: the generation configuration's, else the model configuration's."""
    value = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def shrink(config: Any, widths: bool = True) -> Any:
    """A small configuration of the same class, for checks with random weights.

    widths: shrink hidden sizes too; otherwise only the layers and the vocabulary.

    Only sizes shrink; what decides the structure (layer types, norms, activations, biases, rotary
    kind, key/value sharing) stays. Layers are cut to two of each kind of the layer pattern.
    """
    small = copy.deepcopy(config)
    heads = getattr(config, "num_attention_heads", None) or 4
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    new_heads = min(heads, 4)
    layers = _layers_to_show(config)
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        layers *= 2  # the second half reads the keys of the first
    layers = min(config.num_hidden_layers, layers)
    sizes: dict[str, Any] = {
        "vocab_size": min(config.vocab_size, 512),
        "num_hidden_layers": layers,
        "num_attention_heads": new_heads,
        "num_key_value_heads": 1 if kv_heads == 1 else (new_heads if kv_heads == heads else 2),
        "hidden_size": 16 * new_heads,
        "intermediate_size": 96,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": min(_positions(config), 4096),
    }
    if shared:
        sizes["num_kv_shared_layers"] = layers // 2
    if not widths:
        sizes = {name: sizes[name] for name in _DEPTHS if name in sizes}
    for name, value in sizes.items():
        if isinstance(getattr(config, name, None), int):
            # Some configurations derive a size from others and refuse to have it set.
            with contextlib.suppress(AttributeError):
                setattr(small, name, value)
    for name in ("n_inner", "ffn_dim"):
        if widths and isinstance(getattr(config, name, None), int) and getattr(config, name) > 96:
            setattr(small, name, 96)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    for name in (*_PATTERNS, "activation_sparsity_pattern"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            with contextlib.suppress(AttributeError):
                setattr(small, name, value[:layers])
    _shrink_rotary(small)
    return small


# Where length-dependent rotary scaling switches in a small model: below the tokens of a check.
SHRUNK_LIMIT = 16


def _shrink_rotary(small: Any) -> None:
    """Switching lengths and lists of factors that fit the small sizes."""
    for parameters in rope_dicts(small):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "dynamic":
            small.max_position_embeddings = SHRUNK_LIMIT
        if kind != "longrope":
            continue
        parameters["original_max_position_embeddings"] = SHRUNK_LIMIT
        if hasattr(small, "original_max_position_embeddings"):
            small.original_max_position_embeddings = SHRUNK_LIMIT
        heads = small.num_attention_heads
        size = getattr(small, "head_dim", None) or small.hidden_size // heads
        pairs = -(-int(size * parameters.get("partial_rotary_factor", 1.0)) // 2)
        for name in ("short_factor", "long_factor"):
            values = parameters[name]
            parameters[name] = [values[i * len(values) // pairs] for i in range(pairs)]


_DEPTHS = ("vocab_size", "num_hidden_layers", "num_kv_shared_layers")
# Lists with one entry a layer.
_PATTERNS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def _layers_to_show(config: Any) -> int:
    """Layers until every kind of each pattern has come once, and two at least."""
    patterns = [getattr(config, name, None) or [] for name in _PATTERNS]
    return max(2, *(1 + p.index(kind) for p in patterns for kind in set(p)), 2)
