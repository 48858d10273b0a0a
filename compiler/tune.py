"""`smelt tune`: time tile sizes for an artifact's own shapes on the card that is here.

Every Triton kernel of the lowered program is run on random tensors of its shapes, at each bound a
step is compiled for, with the configurations its module proposes. What beats the present choice
goes into the user's table (runtime/kernels/gpu/tuning.py). The artifact's graphs are compiled anew
with it, because a configuration is part of a compiled kernel: nothing is tuned while requests wait.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program
from smelt.runtime import manifest as manifests
from smelt.runtime.errors import UserError

from .lower import BOUNDS
from .manager import PassManager
from .pipeline import PipelineConfig, pipeline, portable_stages
from .portable import load_portable

# Tables that an operator's kernels are looked up in.
TABLES: dict[str, tuple[str, ...]] = {
    "linear_int4_triton": ("linear_int4",),
    "linear_int8_triton": ("linear_int8",),
    "linear_w8a8_triton": ("linear_w8a8",),
    "linear_w8a8_requantized_triton": ("linear_w8a8",),
    "linear_fp8_triton": ("linear_fp8",),
    "linear_fp8_requantized_triton": ("linear_fp8",),
    "linear_fp8_weight_triton": ("linear_fp8_weight",),
    "experts_triton": ("experts",),
    "experts_int4_triton": ("experts_int4",),
    "rope_write_triton": ("kv_write",),
    "paged_attention_triton": ("attention_decode", "attention_prefill"),
    **{f"quantize_{form}_triton": ("quantize",) for form in ("int8", "fp8")},
    **{
        f"{kernel}{form}_triton": (kernel,)
        for kernel in ("add_rms_norm", "gated_activation")
        for form in ("", "_int8", "_fp8")
    },
}
# The module of kernels that proposes a table's entries, where it has another name.
MODULES = {
    **dict.fromkeys(("attention_decode", "attention_prefill"), "attention"),
    **dict.fromkeys(("add_rms_norm", "gated_activation"), "quantize"),
}
# What a configuration must save before it is kept: less is noise.
GAIN = 0.03

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Sizes:
    """Tokens of a step of prefill, and of the context that decoding attends over."""

    many: int = 2048
    context: int = 4096


@dataclass(frozen=True)
class Tuned:
    """One kernel and shape class. before, after: milliseconds; equal where nothing beat it."""

    kernel: str
    shape: str
    before: float
    after: float
    tried: int


@dataclass(frozen=True)
class _Call:
    """An operator call with real arguments."""

    operator: Any
    args: tuple[Any, ...]

    def __call__(self) -> object:
        return self.operator(*self.args)


def tune(
    folder: Path,
    *,
    measure: Measure | None = None,
    sizes: Sizes | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Tuned]:
    """Time the kernels of the artifact in `folder`; what is faster goes into the user's table.

    measure: milliseconds of a call; by Triton's own timer if None. Raises UserError for an artifact
    without Triton kernels.
    """
    loaded = manifests.read(folder)
    device = loaded.target["device"]
    if not any(p["provider"] == "triton" for p in loaded.providers):
        raise UserError(
            f"{folder} is built for {loaded.target['device']} and has no Triton kernels to tune; "
            "compile it with --device cuda"
        )
    from smelt.runtime.kernels.gpu import operators, tuning  # noqa: F401

    program = load_portable(folder)
    program.target = device
    overrides = tuple((p["operator"], p["provider"]) for p in loaded.providers)
    asked = {"choose-providers": {"overrides": tuple(dict(overrides).items())}}
    stages = portable_stages(pipeline(PipelineConfig("O2", options=asked)))[1]
    PassManager(stages).run(program)
    found = tuning.capability(torch.device(device))
    done: dict[tuple[str, str], Tuned] = {}
    for table, call in _calls(program, device, sizes or Sizes()):
        with tuning.trying(table, None) as looking:
            call()
        for shape in sorted(looking.asked):
            if (table, shape) not in done:
                progress(f"{table} {shape}")
                done[table, shape] = _best(table, shape, call, found, measure or _measure)
    return list(done.values())


def _best(table: str, shape: str, call: _Call, found: int, measure: Measure) -> Tuned:
    from smelt.runtime.kernels.gpu import tuning

    name = MODULES.get(table, table)
    module = importlib.import_module(f"smelt.runtime.kernels.gpu.{name}")
    # One of attention's two tables has to be named.
    candidates = module.candidates(shape, found, *([table] if name == "attention" else []))
    before = measure(call)
    fastest, kept = before, None
    for config in candidates:
        try:
            with tuning.trying(table, config):
                call()
                seconds = measure(call)
        except (RuntimeError, ValueError):
            continue  # more shared memory or registers than the card has
        if seconds < fastest:
            fastest, kept = seconds, config
    if kept is None or fastest > before * (1 - GAIN):
        return Tuned(table, shape, before, before, len(candidates))
    tuning.keep(table, found, shape, kept)
    return Tuned(table, shape, before, fastest, len(candidates))


def _measure(call: Callable[[], object]) -> float:
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))


def _calls(program: Program, device: str, sizes: Sizes) -> Iterator[tuple[str, _Call]]:
    """(table, call) of every kernel of the program, each shape once, at every bound."""
    seen: set[Any] = set()
    for rows, query in BOUNDS.values():
        for node in program.calls():
            name = smelt_name(node) or ""
            if name not in TABLES:
                continue
            key = (name, rows, *(_signature(arg) for arg in node.args))
            if key not in seen:
                seen.add(key)
                call = _Call(node.target, _arguments(node, rows, query, device, sizes))
                yield from ((table, call) for table in TABLES[name])


def _signature(arg: Any) -> Any:
    if not isinstance(arg, fx.Node):
        return arg
    value = arg.meta["val"]
    sizes = tuple(s if isinstance(s, int) else "T" for s in value.shape)
    return sizes, tuple(s if isinstance(s, int) else "T" for s in value.stride()), value.dtype


def _arguments(node: fx.Node, rows: int, query: int, device: str, sizes: Sizes) -> tuple[Any, ...]:
    """Random tensors of a node's shapes for a step of `rows` tokens, of sequences in mid-answer."""
    target: Any = node.target
    tokens = rows or sizes.many
    # Bounded steps decode, a token a sequence; the unbounded one reads one prompt.
    sequences = tokens if rows else 1
    context = max(sizes.context, tokens)
    arguments: list[Any] = []
    for argument, given in zip(target._schema.arguments, node.args, strict=True):
        name = argument.name
        if name in ("rows", "max_query"):
            arguments.append(rows if name == "rows" else query)
        elif not isinstance(given, fx.Node):
            arguments.append(given)
        elif name == "query_start":
            step = tokens // sequences
            starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * step
            arguments.append(starts)
        elif name == "seq_lens":
            arguments.append(torch.full((sequences,), context, dtype=torch.int32, device=device))
        elif name == "block_table":
            width = -(-context // _block_size(node))
            table = torch.randperm(sequences * width, dtype=torch.int32).view(sequences, width)
            arguments.append(table.to(device))
        elif name == "slot_mapping":
            arguments.append(torch.arange(tokens, device=device))
        elif name == "tree_mask":
            arguments.append(torch.ones(tokens, 0, dtype=torch.bool, device=device))
        elif name == "kv_cache":
            value = given.meta["val"]
            blocks = sequences * -(-context // _block_size(node))
            arguments.append(_random((blocks, *value.shape[1:]), value.dtype, device))
        elif name == "index":
            experts = _experts(node)
            choices = int(given.meta["val"].shape[1])
            arguments.append(torch.randint(experts, (tokens, choices), device=device))
        else:
            value = given.meta["val"]
            shape = tuple(s if isinstance(s, int) else tokens for s in value.shape)
            arguments.append(_random(shape, value.dtype, device))
    return tuple(arguments)


def _named(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    return {a.name: value for a, value in zip(target._schema.arguments, node.args, strict=True)}


def _experts(node: fx.Node) -> int:
    named = _named(node)
    return int(named.get("experts") or named["gate_up"].meta["val"].shape[0])


def _block_size(node: fx.Node) -> int:
    return int(_named(node)["kv_cache"].meta["val"].shape[2])


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).mul_(0.05).to(dtype)
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    if dtype == torch.int32:
        low, high = -(1 << 31), 1 << 31
    return torch.randint(low, high, shape, device=device).to(dtype)
