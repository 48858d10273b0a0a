"""Checkpoints of shapes.py in the forms that OpenVINO GenAI and llama.cpp load.

Run by shapes.py in the peers' environment (`make peers`), where smelt is not installed:

    python -m benchmarks.peer_models openvino-int4 CHECKPOINT OUT --group 64

Writes a folder with a `facts.json` in it: bytes of weights that a decoded token reads, in all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Of llama.cpp: the form of the layers' weights, and of the table of tokens and the output.
LLAMA_TYPES = {
    "llama-bf16": ("BF16", "BF16"),
    "llama-q8": ("Q8_0", "Q8_0"),
    "llama-q4": ("Q4_0", "Q8_0"),
}
OPENVINO_BITS = {"openvino-bf16": 16, "openvino-int8": 8, "openvino-int4": 4}
GGUF_FILE = "model.gguf"


def openvino(name: str, checkpoint: Path, to: Path, group: int) -> dict[str, Any]:
    """Export with optimum-intel; 4 bits leaves the table and the output at 8, its default."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = OPENVINO_BITS[name]
    config = None
    if bits == 8:
        config = OVWeightQuantizationConfig(bits=8)
    elif bits == 4:
        config = OVWeightQuantizationConfig(bits=4, group_size=group, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=config
    )
    model.save_pretrained(to)
    _openvino_tokenizer(checkpoint, to)
    total = (to / "openvino_model.bin").stat().st_size
    table = 0 if model.config.tie_word_embeddings else model.config.vocab_size
    table_bytes = table * model.config.hidden_size * (2 if bits == 16 else 1)
    return {"weight_bytes_per_token": total - table_bytes, "weights_bytes": total}


def _openvino_tokenizer(checkpoint: Path, to: Path) -> None:
    """The pipeline does not open without one; the prompts are ids."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    both = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for model, file in zip(both, ("tokenizer", "detokenizer"), strict=True):
        save_model(model, to / f"openvino_{file}.xml")


def llama(name: str, checkpoint: Path, to: Path, group: int) -> dict[str, Any]:
    """Write GGUF with the `gguf` package, in the order of rows that llama.cpp's rotation wants."""
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(to / GGUF_FILE, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    inner, outer = LLAMA_TYPES[name]
    total = read = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            values = tensor.float().numpy()
            for part, count in heads.items():
                if part in key:
                    halves = values.reshape(count, 2, -1, values.shape[1])
                    values = halves.swapaxes(1, 2).reshape(values.shape)
            outside = key.startswith(("model.embed_tokens", "lm_head"))
            kind = gguf.GGMLQuantizationType[outer if outside else inner]
            if values.ndim == 1:
                kind = gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(values, kind)
            to_name = names.get_name(key, try_suffixes=(".weight",))
            writer.add_tensor(to_name, data, raw_dtype=kind)
            total += data.nbytes
            looked_up = "embed_tokens" in key and not config.tie_word_embeddings
            read += 0 if looked_up else data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"weight_bytes_per_token": read, "weights_bytes": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*LLAMA_TYPES, *OPENVINO_BITS])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group", type=int, default=128)
    given = parser.parse_args()
    make = llama if given.name in LLAMA_TYPES else openvino
    given.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=given.out.parent, prefix=f".{given.out.name}."))
    facts = make(given.name, given.checkpoint, scratch, given.group)
    (scratch / "facts.json").write_text(json.dumps(facts))
    scratch.chmod(0o755)
    shutil.rmtree(given.out, ignore_errors=True)
    scratch.rename(given.out)


if __name__ == "__main__":
    main()
