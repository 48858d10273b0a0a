"""`smelt inspect`: what an artifact is, what made it, what each pass did and why it declined."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from . import layers
from .compile import size
from .options import Artifact
from .passes import print_passes


def command(
    artifact: Artifact,
    every: Annotated[bool, typer.Option("--layers", help="Every linear layer.")] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Every pass, place by place.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What an artifact is, how its layers are stored and computed, what each pass did."""
    from smelt.runtime import manifest as manifests
    from smelt.runtime.integrity import verify

    manifest = manifests.read(artifact)
    verify(artifact, manifest.files)
    if as_json:
        print(json.dumps({**manifest.to_json(), "layers": layers.joined(manifest)}))
        return
    _print_overview(manifest)
    _print_layers(layers.joined(manifest), every)
    print_passes(manifest.passes)
    if passes:
        for record in manifest.passes:
            _print_places(record)
    else:
        print("\nsmelt inspect --layers shows every layer, --passes each pass place by place")


def _print_layers(rows: list[dict[str, Any]], every: bool) -> None:
    """The linear layers; those that are alike in one line, with their largest errors."""
    if not rows:
        return
    print()
    layers.show(rows if every else layers.by_kind(rows))
    print()


def _print_overview(manifest: Any) -> None:
    model, target, memory = manifest.model, manifest.target, manifest.memory
    print(f"model     {model['name']} ({model['class']}), {model['parameters']:,} parameters")
    print(f"context   {model['max_position']} tokens, vocabulary {model['vocab_size']}")
    print(f"weights   {size(model['source_bytes'])} -> {size(memory['weights_bytes'])}")
    cache = manifest.cache
    held = (
        cache.dtype if cache.format == "auto" else f"{cache.format} with a scale a head and token"
    )
    print(f"KV cache  {size(memory['kv_bytes_per_token'])} a token, {held}")
    spec = manifest.quant
    quant = "none" if spec["method"] == "none" else f"{spec['method']} {spec['format']}"
    if spec.get("activations", "none") != "none":
        quant += f", {spec['activations']} activations"
    print(f"quant     {quant}, computes in {model['dtype']}")
    print(f"runs on   {target['device']}, {target['machine']}, torch {target['torch']}")
    print(f"backend   {manifest.backend}, made {manifest.build.get('date')}")
    chosen = Counter((p["operator"], p["provider"]) for p in manifest.providers)
    print("kernels   " + ", ".join(f"{op}: {by} x{n}" for (op, by), n in sorted(chosen.items())))


def _print_places(record: dict[str, Any]) -> None:
    declined = record.get("declined", [])
    notes = record.get("notes", [])
    if not declined and not notes:
        return
    print(f"\n{record['name']}")
    for place in declined:
        print(f"  left alone  {place['where']}: {place['reason']}")
    for note in notes:
        print("  " + ", ".join(f"{k} {_short(v)}" for k, v in note.items() if v not in (None, "")))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
