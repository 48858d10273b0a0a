"""`smelt plan MODEL`: the memory a model will need and what computes it, before it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from smelt.compiler.plan import MemoryPlan


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder, a config.json, or a hub name; no weights needed."
        ),
    ],
    ctx: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--ctx", help="Tokens of a sequence; default 4096 or the context.", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 1,
    quant: Annotated[
        str, typer.Option("--quant", help="none, rtn, awq, gptq, smoothquant, fp8 or mixed.")
    ] = "none",
    format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--format", help="int4, int8, int3, int2 or fp8.", show_default=False),
    ] = None,
    group_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--group-size", help="Weights that share a scale.", show_default=False),
    ] = None,
    kv_cache: Annotated[
        str, typer.Option("--kv-cache", help="auto (the model's dtype), fp8, int8 or int4.")
    ] = "auto",
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--alpha", help="smoothquant's exponent.", show_default=False),
    ] = None,
    activations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--activations", help="dynamic or static.", show_default=False),
    ] = None,
    bits: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--bits", help="mixed's budget: bits a weight (4.5).", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's folder.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Memory, and each layer's format and kernel, from the configuration alone."""
    from smelt.compiler.plan import plan

    found = plan(
        model,
        ctx=ctx,
        batch=batch,
        trust_remote_code=trust_remote_code,
        quant=quant,
        format=format,
        group_size=group_size,
        kv_cache=kv_cache,
        alpha=alpha,
        activations=activations,
        bits=bits,
        dtype=dtype,
        device=device,
    )
    if as_json:
        import json

        print(json.dumps(found.to_json()))
        return
    from dataclasses import asdict

    from rich.console import Console

    from . import layers

    console = Console(highlight=False)
    console.print(table(found))
    layers.show([asdict(kind) for kind in found.layers])
    for line in (verdict(found), *(f"note: {note}" for note in found.notes)):
        console.print(line, markup=False, soft_wrap=True)


def table(found: MemoryPlan) -> Table:
    """The parts and their sum."""
    from rich.table import Table

    title = f"{found.model_class}, {found.parameters / 1e9:.3g} B parameters"
    made = Table(title=title, title_justify="left")
    made.add_column("part")
    made.add_column("memory", justify="right")
    made.add_column("what it is")
    weights = f"{found.dtype}, {found.quant}"
    if found.quant == "none":
        weights = found.dtype
    elif found.weights_bytes:
        ratio = found.weights_unquantized_bytes / found.weights_bytes
        weights += f": {ratio:.2f} times smaller than in {found.dtype}"
    made.add_row("weights", size(found.weights_bytes), weights)
    cache = f"{found.batch} x {found.ctx} tokens, {size(found.kv_bytes_per_token)} a token"
    if found.kv_cache != "auto":
        cache += f", {found.kv_cache}"
    made.add_row("KV cache", size(found.kv_bytes), cache)
    made.add_row("activations", size(found.activation_bytes), "buffers of the largest step")
    if found.device == "cuda":
        made.add_row("CUDA graphs", size(found.graph_bytes), "inputs and logits of captured steps")
    made.add_section()
    made.add_row("total", size(found.total_bytes), "")
    return made


def verdict(found: MemoryPlan) -> str:
    """Whether it fits into this machine, or its CUDA device."""
    if found.memory_total_bytes is None or found.memory_available_bytes is None:
        return "this machine has no CUDA device: compare the total with your card's memory"
    where = "this machine" if found.device == "cpu" else "this CUDA device"
    free, all_ = size(found.memory_available_bytes), size(found.memory_total_bytes)
    if found.fits:
        return f"fits: {free} of {where}'s {all_} are free"
    if found.total_bytes <= found.memory_total_bytes:
        return f"does not fit now: {free} of {where}'s {all_} are free; close something"
    return (
        f"does not fit: {where} has {all_}; try --quant awq, --kv-cache int8, a smaller "
        "--ctx or --batch, or a smaller model"
    )


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
