"""Random-weight Llama checkpoints to measure with, and what smelt makes of them; made once.

They lie in a cache folder ($SMELT_BENCH_CACHE, else ~/.cache/smelt/bench): one Hugging Face folder
a shape, one artifact a quantization. An artifact is made again when the compiler's inputs differ
from what its name says: smelt's sources, torch's version, quantization.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import PEERS

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """A Llama. group: int4 group size, chosen so that it divides every K of the model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    group: int
    context: int = CONTEXT

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' LlamaConfig."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.context,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


# S: K is 576 and 1536, both multiples of 64 and neither of 128. M: 2048 and 5632 are of 128.
SHAPES = {
    "tiny": Shape("tiny", 128, 2, 4, 2, 384, 1024, True, 64),
    "S": Shape("S", 576, 30, 9, 3, 1536, 49152, True, 64),
    # For what does not depend on the number of layers.
    "S2": Shape("S2", 576, 2, 9, 3, 1536, 49152, True, 64),
    "S8k": Shape("S8k", 576, 30, 9, 3, 1536, 49152, True, 64, context=8192),
    "M": Shape("M", 2048, 22, 32, 4, 5632, 32000, False, 128),
}
QUANTS: dict[str, dict[str, Any]] = {
    "bf16": {"quant": "none"},
    "int8": {"quant": "rtn", "format": "int8"},
    "int4": {"quant": "rtn", "format": "int4"},
    "int3": {"quant": "rtn", "format": "int3"},
    # Without outliers to move: the arithmetic is the same, and random weights have none.
    "w8a8": {"quant": "smoothquant", "alpha": 0.0},
}


def cache_folder() -> Path:
    """Where checkpoints and artifacts are kept."""
    named = os.environ.get("SMELT_BENCH_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "smelt" / "bench"


def checkpoint(shape: Shape) -> Path:
    """The Hugging Face folder of a shape, made now if it is not there."""
    key = hashlib.sha256(json.dumps(shape.config(), sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_folder() / f"{shape.name}-{key}"
    if not (folder / "config.json").is_file():
        _child("checkpoint", shape.name, folder)
    return folder


def artifact(shape: Shape, quant: str) -> Path:
    """The artifact of a shape in one of `QUANTS`, compiled now if it is not there."""
    source = checkpoint(shape)
    folder = source.with_name(f"{source.name}-{quant}-{_sources_key()}")
    if not (folder / "manifest.json").is_file():
        for old in source.parent.glob(f"{source.name}-{quant}-*"):
            shutil.rmtree(old)
        _child("artifact", shape.name, folder, quant)
    return folder


def python_of(contender: str) -> str:
    """The interpreter that a contender runs in: this one, or that of `make peers`."""
    if contender not in PEERS:
        return sys.executable
    python = ROOT / "build" / "peers" / "bin" / "python"
    if not python.exists():
        sys.exit(f"no {python}: run `make peers` first, which builds llama.cpp and takes minutes")
    return str(python)


def peer_model(shape: Shape, peer: str) -> Path:
    """A shape's checkpoint in a peer's own form (peer_models.py), made now if it is not there."""
    source = checkpoint(shape)
    digest = hashlib.sha256((ROOT / "benchmarks/peer_models.py").read_bytes()).hexdigest()[:8]
    folder = source.with_name(f"{source.name}-{peer}-{digest}")
    if not (folder / "facts.json").is_file():
        print(f"making {folder.name}", file=sys.stderr, flush=True)
        command = [python_of(peer), "-m", "benchmarks.peer_models", peer, str(source)]
        command += [str(folder), "--group", str(shape.group)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return folder


def _sources_key() -> str:
    """Hash of what an artifact follows from."""
    digest = hashlib.sha256(_torch_version().encode())
    for package in ("compiler", "models", "passes", "runtime/ops", "runtime/kernels"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and "demo" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def _child(*arguments: object) -> None:
    """Make it in a process of its own: the benchmark's parent never imports torch."""
    print(f"making {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.shapes", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """Write random bf16 weights, configuration and a byte tokenizer; the folder appears whole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**shape.config(), dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(scratch)
    _write_tokenizer(scratch)
    scratch.chmod(0o755)
    scratch.rename(folder)


def _write_tokenizer(folder: Path) -> None:
    """BOS, EOS and 256 byte tokens: enough for loading; the prompts are random ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_artifact(shape: Shape, folder: Path, quant: str) -> None:
    """Compile the shape's checkpoint."""
    import smelt

    options = dict(QUANTS[quant])
    if quant in ("int4", "int3"):
        options["group_size"] = shape.group
    smelt.compile(checkpoint(shape), folder, dtype="bf16", force=True, **options)


if __name__ == "__main__":
    verb, shape_name, target, *rest = sys.argv[1:]
    if verb == "checkpoint":
        make_checkpoint(SHAPES[shape_name], Path(target))
    else:
        make_artifact(SHAPES[shape_name], Path(target), rest[0])
