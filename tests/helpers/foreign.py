"""Quantized checkpoints as other projects write them, with the plain model they stand for.

The packing here follows the publications of AutoAWQ and GPTQ word by word, in numpy loops of its
own; compressed-tensors checkpoints are written by that package's compressors. None of it uses
smelt's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import mixtures
from helpers.quantized import module
from safetensors.torch import save_file

AWQ_PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Integers:
    """q [N, K] and zeros [N, G] as unsigned integers, scales [N, G], group [K] of every feature."""

    q: np.ndarray
    scales: torch.Tensor
    zeros: np.ndarray
    group: np.ndarray

    def weight(self) -> torch.Tensor:
        q = torch.from_numpy(self.q.astype(np.float32))
        zeros = torch.from_numpy(self.zeros.astype(np.float32))[:, self.group]
        return (q - zeros) * self.scales.float()[:, self.group]


def integers(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    scale: torch.dtype = torch.bfloat16,
    order: np.ndarray | None = None,
) -> Integers:
    """Round a weight [N, K] to nearest. order: the group of each feature, by default in turn."""
    n, k = weight.shape
    size = k if group <= 0 else group
    of = np.arange(k) // size if order is None else order
    groups = int(of.max()) + 1
    top = 2**bits - 1
    scales = torch.empty(n, groups)
    zeros = np.empty((n, groups), dtype=np.int64)
    for g in range(groups):
        part = weight[:, torch.from_numpy(np.flatnonzero(of == g))].float()
        if symmetric:
            scales[:, g] = (part.abs().amax(1) / (top // 2)).to(scale).float()
            zeros[:, g] = 2 ** (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = ((high - low) / top).to(scale).float()
            zeros[:, g] = torch.round(-low / scales[:, g]).clamp(0, top).long().numpy()
    wide = weight.float() / scales[:, of] + torch.from_numpy(zeros)[:, of]
    q = wide.round().clamp(0, top).to(torch.int64).numpy()
    return Integers(q, scales.to(scale), zeros, of)


def _words(columns: np.ndarray, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """[R, C] of unsigned values -> int32 [R, C * bits / 32]; order: the value at each place."""
    a_word = 32 // bits
    packed = np.zeros((columns.shape[0], columns.shape[1] // a_word), dtype=np.uint32)
    for word in range(packed.shape[1]):
        for place in range(a_word):
            value = columns[:, word * a_word + order[place]].astype(np.uint32)
            packed[:, word] |= value << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def awq_tensors(x: Integers) -> dict[str, torch.Tensor]:
    """AutoAWQ's GEMM layout."""
    return {
        "qweight": _words(x.q.T, 4, AWQ_PACK_ORDER),
        "qzeros": _words(x.zeros.T, 4, AWQ_PACK_ORDER),
        "scales": x.scales.T.contiguous(),
    }


def gptq_tensors(x: Integers, bits: int = 4, v2: bool = False) -> dict[str, torch.Tensor]:
    """GPTQ's layout; version 1 subtracts one from every zero point, word by word."""
    places = tuple(range(32 // bits))
    zeros = _words(x.zeros.T, bits, places)
    if not v2:
        ones = sum(1 << (bits * i) for i in places)
        zeros = zeros - ones
    return {
        "qweight": _words(x.q, bits, places).T.contiguous(),
        "qzeros": zeros,
        "scales": x.scales.T.contiguous(),
        "g_idx": torch.from_numpy(x.group.astype(np.int32)),
    }


Quantizer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def linears(model: torch.nn.Module) -> list[str]:
    """Module paths of all linears but the one of the logits."""
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and not name.endswith("lm_head")
    ]


def write(
    folder: Path,
    model: Any,
    config: dict[str, Any],
    quantizer: Quantizer,
    only: Callable[[str], bool] = lambda name: True,
) -> torch.nn.Module:
    """Write `model` with its linears, those of experts too, replaced by what `quantizer` makes of
    them; returns the model with the weights those stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = copy.deepcopy(model)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    experts = mixtures.apart(model)
    if experts:
        state = mixtures.renamed(model, state)
        state |= {f"{path}.weight": weight.clone() for path, weight in experts.items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name in (*linears(model), *experts):
        if not only(name):
            continue
        tensors, weight = quantizer(name, state.pop(f"{name}.weight"))
        state |= {f"{name}.{leaf}": value for leaf, value in tensors.items()}
        if name in experts:
            mixtures.put(reference, name, weight.to(torch.float32))
        else:
            reference.get_submodule(name).weight.data = weight.to(torch.float32)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    raw = {**model.config.to_dict(), "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(raw))
    return reference


Change = Callable[[str, dict[str, torch.Tensor]], None]


def awq(
    folder: Path,
    model: Any = None,
    scale: torch.dtype = torch.bfloat16,
    made: dict[str, Integers] | None = None,
    only: Callable[[str], bool] = lambda name: True,
    change: Change = lambda name, tensors: None,
) -> torch.nn.Module:
    """made: filled with the integers of every module. change: damages a module's tensors."""

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        x = integers(w, group=32, scale=scale)
        if made is not None:
            made[name] = x
        tensors = awq_tensors(x)
        change(name, tensors)
        return tensors, x.weight()

    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config |= {"zero_point": True}
    return write(folder, model or module("Llama"), config, quantizer, only)


def fp8(
    folder: Path,
    sizes: tuple[int, int] | None = (128, 128),
    input_scale: float | None = None,
    model: Any = None,
) -> torch.nn.Module:
    """DeepSeek's layout: float8_e4m3fn, and a float32 scale to multiply with for every block;
    sizes None: one scale a tensor. input_scale: of static activations, the same for all layers."""

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n, k = w.shape
        block = sizes or (n, k)
        scales = torch.empty(-(-n // block[0]), -(-k // block[1]))
        stored = torch.empty(n, k, dtype=torch.float8_e4m3fn)
        weight = torch.empty(n, k)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                rows = slice(i * block[0], (i + 1) * block[0])
                columns = slice(j * block[1], (j + 1) * block[1])
                scales[i, j] = w[rows, columns].abs().max() / 448
                stored[rows, columns] = (w[rows, columns] / scales[i, j]).to(torch.float8_e4m3fn)
                weight[rows, columns] = stored[rows, columns].float() * scales[i, j]
        scales = scales if sizes else scales.reshape(())
        tensors = {"weight": stored, "weight_scale_inv": scales}
        if input_scale is not None:
            tensors["activation_scale"] = torch.tensor(input_scale)
        return tensors, weight

    config = {"quant_method": "fp8", "fmt": "e4m3"}
    config["activation_scheme"] = "dynamic" if input_scale is None else "static"
    config |= {"weight_block_size": list(sizes) if sizes else None}
    return write(folder, model or module("Llama"), config, quantizer)


def gptq(
    folder: Path,
    *,
    model: Any = None,
    bits: int = 4,
    v2: bool = False,
    symmetric: bool = False,
    order: str = "",
    group: int = 32,
    **changes: Any,
) -> torch.nn.Module:
    """order: "features" (desc_act), "groups" (whole groups change places), or none. With "features"
    all experts' gate and up have one order, with "experts" each expert has its own."""

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        k = w.shape[1]
        of = np.arange(k) // (group if group > 0 else k)
        if order:
            # Layers that read one input have one Hessian, and so one order.
            kind = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 1, "up_proj": 1}
            kind |= {"w1": 1, "w3": 1}
            _, _, layer, *_, expert, leaf = name.split(".")
            seed = kind.get(leaf, 2) + 10 * int(layer)
            if expert.isdigit() and (kind.get(leaf, 2) == 2 or order == "experts"):
                seed += 1000 * (1 + int(expert))
            random = np.random.default_rng(seed)
            if order != "groups":
                of = random.permutation(of)
            else:
                of = random.permutation(of.max() + 1)[of]
        x = integers(w, bits=bits, group=group, symmetric=symmetric, order=of)
        return gptq_tensors(x, bits, v2), x.weight()

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric}
    config |= {"desc_act": bool(order), "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return write(folder, model or module("Llama"), {**config, **changes}, quantizer)


def compressed(
    folder: Path,
    *,
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    model: Any = None,
    exact: bool = True,
    input_scale: Callable[[str], float] | None = None,
) -> torch.nn.Module:
    """A checkpoint written by the compressed-tensors package. exact: bfloat16 can hold its scales,
    which are stored as float32 so that the package dequantizes in float32. input_scale: of static
    activations, by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    inputs = QuantizationArgs(**activations) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    form = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form.value)

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scales, zeros = calculate_qparams(*_ranges(w, args), args)
        if exact:
            scales = scales.bfloat16().float()
        state = {"weight": w, "weight_scale": scales}
        if not args.symmetric:
            state["weight_zero_point"] = zeros
        packed = compressor.compress(state, scheme)
        if input_scale is not None:
            packed["input_scale"] = torch.tensor([input_scale(name)])
        return packed, compressor.decompress(packed, scheme)["weight"]

    group = {
        "targets": ["Linear"],
        "weights": args.model_dump(mode="json"),
        "input_activations": inputs.model_dump(mode="json") if inputs else None,
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": form.value,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return write(folder, model or module("Llama"), config, quantizer)


def rounding_inputs(
    reference: torch.nn.Module,
    kind: str,
    group: int = 0,
    scale: Callable[[str], float] | None = None,
) -> torch.nn.Module:
    """`reference` with the inputs of its linears rounded to "int8" or "float8" and back, the one of
    the logits excepted: a scale a token, or for `group` features of it, or `scale` of a module."""
    most = 127.0 if kind == "int8" else 448.0

    def rounded(x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(-most, most)
        return x.round() if kind == "int8" else x.to(torch.float8_e4m3fn).float()

    def hook(name: str) -> Callable[..., Any]:
        def apply(_: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
            parts = list(args[0].split(group or args[0].shape[-1], -1))
            for i, x in enumerate(parts):
                own = x.abs().amax(-1, keepdim=True) / most if scale is None else scale(name)
                parts[i] = rounded(x / own) * own
            return torch.cat(parts, -1)

        return apply

    for name in linears(reference):
        reference.get_submodule(name).register_forward_pre_hook(hook(name))
    return reference


def compressed_out_of_order(folder: Path) -> torch.nn.Module:
    """compressed-tensors as it was written with activation order: `weight_g_idx` beside the packed
    weight. The package itself no longer writes it."""

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        k = w.shape[1]
        x = integers(w, symmetric=True, order=np.random.default_rng(k).permutation(k) // 32)
        tensors = {
            "weight_packed": _words(x.q, 4, tuple(range(8))),
            "weight_scale": x.scales,
            "weight_shape": torch.tensor(list(w.shape)),
            "weight_g_idx": torch.from_numpy(x.group.astype(np.int32)),
        }
        return tensors, x.weight()

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    weights |= {"actorder": "group"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return write(folder, module("Llama"), config, quantizer)


def _ranges(w: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of what each scale covers, in the shape of the scales."""
    strategy = str(args.strategy)
    if strategy == "tensor":
        return w.min().reshape(1), w.max().reshape(1)
    if strategy == "channel":
        return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if strategy == "group":
        parts = w.unflatten(1, (-1, args.group_size))
        return parts.amin(-1), parts.amax(-1)
    rows, columns = args.block_structure
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    parts = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return parts.amin((1, 3)), parts.amax((1, 3))
