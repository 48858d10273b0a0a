"""How much memory a model will need, from its configuration alone: nothing is built or downloaded.

    weights      every parameter of the module, once where tied, in the model's dtype; a linear that
                 the method quantizes counts its bits a weight with a bfloat16 scale and a byte of
                 zero point a group (int4, int3, int2), or 8 bits with a bfloat16 scale a group or
                 row (int8; a float32 scale a row for smoothquant and fp8, or one for 128 x 128
                 weights). Experts count likewise, each of their matrices by itself. Embeddings,
                 the logits' linear and routers keep the model's dtype.
    KV cache     2 x key/value heads x head size x bytes for every layer and token, in whole blocks;
                 a layer with a sliding window needs no more tokens than its window. Quantized, a
                 head's row takes 1 byte a value and 4 more (int8), half a byte and 4 (int4), or 1
                 byte and 2 (fp8).
    activations  T x (2 x hidden + widest) x bytes + batch x vocabulary x (bytes + 4), with T the
                 tokens of the largest step. `widest` is the most that one attention or MLP block
                 holds at once, its fused projections and what goes into or out of them; the second
                 term is the logits and their float32 copy.
    CUDA graphs  with --device cuda: the inputs of the largest step that is a graph, with block
                 tables of the whole context, and logits for every power of two of rows, from 16 to
                 the batch. What graphs compute in between is the activations' share.

Not counted: Python and torch themselves (about 250 MiB), and what compiling needs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.models.checkpoint import Checkpoint
from smelt.models.config import load_config, max_positions
from smelt.models.folder import read_json, resolve
from smelt.models.quantized import describe
from smelt.models.skeleton import build
from smelt.runtime import machine
from smelt.runtime.batch import BatchLayout
from smelt.runtime.cuda_graphs import static_bytes
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.ops.cache_format import row_bytes

from .layers import LayerKind, is_experts, is_router, kinds, layers, linears
from .options import DTYPES, CompileOptions
from .stored import refuse_another

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, but for ctx (tokens a sequence), batch (sequences) and parameters (a count).

    weights_unquantized_bytes: what the weights would take in the model's dtype. memory_...: of this
    machine, or of its CUDA device where that was asked for. fits: whether the total is below what
    is free there now. All three are None where there is no such device. notes: what the numbers
    leave out or assume. layers: how the linear layers are stored, and what computes them.
    """

    model_class: str
    parameters: int
    dtype: str
    quant: str
    kv_cache: str
    device: str
    ctx: int
    batch: int
    weights_bytes: int
    weights_unquantized_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    activation_bytes: int
    graph_bytes: int
    total_bytes: int
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    fits: bool | None
    notes: tuple[str, ...] = ()
    layers: tuple[LayerKind, ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "notes": list(self.notes), "layers": list(data["layers"])}


def plan(
    model: str,
    *,
    ctx: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
    **options: Any,
) -> MemoryPlan:
    """The memory plan of `model`: a folder, a config.json under any name, or a hub name.

    ctx: tokens of each of `batch` sequences; by default 4096 or the model's context. options: those
    of `CompileOptions` (quant, format, group_size, alpha, activations, kv_cache, dtype, device).
    Raises UserError for combinations that do not work, and for a configuration that is no causal
    language model.
    """
    settings = CompileOptions(trust_remote_code=trust_remote_code, **options)
    if batch < 1:
        raise UserError(f"--batch is {batch}: give 1 or more")
    with config_folder(model) as (folder, notes):
        try:
            config = load_config(folder, trust_remote_code)
        except UserError as error:
            # A temporary copy's path would tell the user nothing.
            text = str(error).replace(f"{folder}/config.json", model).replace(str(folder), model)
            raise UserError(text) from error
        dtype = _dtype(settings.dtype, config, folder, notes)
        stored = describe(read_json(folder / "config.json"), model)
    ctx = _context(ctx, max_positions(config))
    skeleton = build(config, dtype, real=False, trust_remote_code=trust_remote_code)
    label = settings.spec.label()
    if stored is not None:
        refuse_another(stored, settings.spec, model)
        label = stored.label()
        notes.append(f"the checkpoint is quantized ({label}) and compiled as it is")
    decided = layers(skeleton, settings.spec, stored)
    if stored is not None and any(layer.experts and not layer.scheme for layer in decided):
        notes.append(f"experts count as {str(dtype).removeprefix('torch.')}: dequantized")
    plain = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    packed = plain - sum(layer.saved for layer in decided)
    per_layer = kv_bytes_per_layer(config, dtype, settings.kv_cache)
    tokens = [_held(ctx, window, settings.block_size) for window in layer_windows(config)]
    kv_bytes = batch * sum(b * t for b, t in zip(per_layer, tokens, strict=True))
    step = min(settings.max_tokens, batch * ctx)
    activations = activation_bytes(skeleton, config, dtype, step, batch)
    graphs = graph_bytes(config, dtype, settings, batch) if settings.device == "cuda" else 0
    total = packed + kv_bytes + activations + graphs
    installed, available = _memory(settings.device)
    whole = batch * sum(per_layer) * _held(ctx, 0, settings.block_size)
    if whole > kv_bytes:
        notes.append(
            "layers with a sliding window count their window alone; the engine reserves as many "
            f"blocks for them as for the others now, which makes {whole / 2**30:.2f} GiB"
        )
    return MemoryPlan(
        model_class=type(skeleton).__name__,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        quant=label,
        kv_cache=settings.kv_cache,
        device=settings.device,
        ctx=ctx,
        batch=batch,
        weights_bytes=packed,
        weights_unquantized_bytes=plain,
        kv_bytes_per_token=sum(per_layer),
        kv_bytes=kv_bytes,
        activation_bytes=activations,
        graph_bytes=graphs,
        total_bytes=total,
        memory_total_bytes=installed,
        memory_available_bytes=available,
        fits=None if available is None else total <= available,
        notes=tuple(notes),
        layers=tuple(kinds(decided, settings.device)),
    )


@contextmanager
def config_folder(model: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder with the configuration of `model`, and notes about how it was read.

    A lone JSON file is copied into a temporary folder; of a hub name only config.json is fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        yield resolve(path), []
        return
    if not path.is_file() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(
            f"no file or folder {model}; name a config.json, a model folder, or OWNER/NAME"
        )
    path = path if path.is_file() else _hub_config(model)
    with tempfile.TemporaryDirectory(prefix="smelt-plan-") as name:
        folder = Path(name) / path.stem
        folder.mkdir()
        raw = read_json(path)
        notes = _settle_class(raw)
        (folder / "config.json").write_text(json.dumps(raw))
        yield folder, notes


def _settle_class(raw: dict[str, Any]) -> list[str]:
    """Let a lone configuration's architecture decide where its model_type says something else.

    Converted configurations carry types transformers does not know, or that mean another class; it
    would then build the wrong model with default sizes.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    named = (raw.get("architectures") or [""])[0]
    kind = raw.get("model_type")
    types = [t for t, classes in NAMES.items() if classes == named]
    if not types:
        return []
    raw.pop("auto_map", None)  # transformers has the class: the folder's code is not needed
    if kind in types:
        return []
    plain = named.removesuffix("ForCausalLM").lower()
    raw["model_type"] = plain if plain in types else types[0]
    return [f"model_type {kind} is not that of {named}: read as {raw['model_type']}"]


def _hub_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except HFValidationError as error:
        raise UserError(f"no file or folder {name}, and it is not a hub name: {error}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        line = str(error).strip().split("\n")[0]
        raise SmeltError(
            f"no file or folder {name}, and its config.json cannot be had from the hub ({line}); "
            "go online, or name a local file"
        ) from error


def _dtype(asked: str, config: Any, folder: Path, notes: list[str]) -> torch.dtype:
    """As asked; else that of most of the weights that are there, else the configuration's."""
    if asked != "auto":
        named = getattr(torch, DTYPES[asked])
        assert isinstance(named, torch.dtype)
        return named
    if any(folder.glob("*.safetensors")):
        sizes: dict[torch.dtype, int] = {}
        for entry in Checkpoint(folder).entries.values():
            if entry.dtype.is_floating_point and entry.dtype.itemsize > 1:
                count = torch.Size(entry.shape).numel() * entry.dtype.itemsize
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + count
        if sizes:
            return max(sizes, key=lambda d: sizes[d])
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if isinstance(found, torch.dtype):
        return found
    notes.append("the configuration names no dtype: bf16 is assumed")
    return torch.bfloat16


def _context(asked: int | None, limit: int) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT, limit)
    if not 1 <= asked <= limit:
        raise UserError(f"--ctx is {asked}: the model's context goes from 1 to {limit} tokens")
    return asked


def kv_bytes_per_layer(config: Any, dtype: torch.dtype, kv_cache: str = "auto") -> list[int]:
    """Bytes of K and V that one token takes in each layer, in cache format `kv_cache`."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return [2 * kv_heads * row_bytes(size, kv_cache, dtype)] * int(config.num_hidden_layers)


def layer_windows(config: Any) -> list[int]:
    """The sliding window of each layer in tokens, 0 for full attention."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * int(config.num_hidden_layers)
    chunk = int(getattr(config, "attention_chunk_size", None) or 0)
    sizes = {"sliding_attention": window, "chunked_attention": chunk}
    return [sizes.get(kind, 0) for kind in kinds]


def _memory(device: str) -> tuple[int | None, int | None]:
    """(installed, free) bytes of the machine, or of its first CUDA device."""
    if device == "cpu":
        return machine.memory()
    if not torch.cuda.is_available():
        return None, None
    free, installed = torch.cuda.mem_get_info()
    return installed, free


def _held(ctx: int, window: int, block: int) -> int:
    """Tokens a layer keeps of a sequence of `ctx`, rounded up to blocks."""
    tokens = min(ctx, window) if window else ctx
    return -(-tokens // block) * block


def activation_bytes(
    skeleton: Any, config: Any, dtype: torch.dtype, tokens: int, batch: int
) -> int:
    """Bytes of the largest buffers alive at once in a step of `tokens` tokens (see the module)."""
    widest = 0
    blocks: dict[str, list[tuple[int, int]]] = {}
    head = skeleton.get_output_embeddings()
    for name, module, n, k in linears(skeleton):
        if module is head or is_router(skeleton, name):
            continue
        blocks.setdefault(name.rpartition(".")[0], []).append((n, k))
    for sizes in blocks.values():
        together: dict[int, int] = {}
        for n, k in sizes:
            together[k] = together.get(k, 0) + n
        widest = max(widest, max(together.values()) + max(together))
    for module in skeleton.modules():
        if is_experts(module):
            # The experts run one after another, the largest with every token.
            widths = [p.shape[1:] for p in module.parameters() if p.dim() == 3]
            widest = max([widest, *(sum(shape) for shape in widths)])
    size = dtype.itemsize
    step = tokens * (2 * int(config.hidden_size) + widest) * size
    return step + batch * int(config.vocab_size) * (size + 4)


def graph_bytes(config: Any, dtype: torch.dtype, settings: CompileOptions, batch: int) -> int:
    """Bytes of the inputs and the logits of CUDA graphs (see the module)."""
    tokens, context = settings.max_tokens, max_positions(config)
    blocks = -(-context // settings.block_size)
    layout = BatchLayout(tokens, min(256, tokens), blocks, tokens, context)
    groups = len(set(layer_windows(config)))
    return static_bytes(layout, groups, int(config.vocab_size) * dtype.itemsize, batch)
