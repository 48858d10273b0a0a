"""`smelt compile`: a model to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from smelt.runtime.errors import UserError

from .passes import print_passes
from .progress import reporting

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or OWNER/NAME.")]
OptionalStr = Optional[str]  # noqa: UP045  (typer evaluates annotations on Python 3.10)
OptionalInt = Optional[int]  # noqa: UP045
OptionalFloat = Optional[float]  # noqa: UP045
OptionalPath = Optional[Path]  # noqa: UP045
Names = Optional[list[str]]  # noqa: UP045


def command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the artifact.")],
    quant: Annotated[
        str, typer.Option(help="none, rtn, awq, gptq, smoothquant, fp8 or mixed.")
    ] = "none",
    format: Annotated[OptionalStr, typer.Option(help="int4, int8, int3, int2 or fp8.")] = None,
    group_size: Annotated[
        OptionalInt, typer.Option(help="Weights that share a scale; 0 is a whole row.")
    ] = None,
    kv_cache: Annotated[
        str, typer.Option("--kv-cache", help="auto (the model's dtype), fp8, int8 or int4.")
    ] = "auto",
    features: Annotated[
        str, typer.Option(help="none; for speculation heads final (Medusa) or eagle3.")
    ] = "none",
    alpha: Annotated[
        OptionalFloat, typer.Option(help="smoothquant's exponent, 0 to 1; searched if left out.")
    ] = None,
    activations: Annotated[
        OptionalStr, typer.Option(help="smoothquant, fp8: dynamic (a scale a token) or static.")
    ] = None,
    bits: Annotated[
        OptionalFloat, typer.Option(help="mixed's budget: bits a weight, scales included (4.5).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bf16, fp16, fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    calib: Annotated[
        str, typer.Option(help="FILE.txt, FILE.jsonl, hf:NAME[:SPLIT] or builtin.")
    ] = "builtin",
    calib_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    calib_seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    opt: Annotated[str, typer.Option(help="O0 correct, O1 canonical, O2 fused.")] = "O2",
    pass_: Annotated[Names, typer.Option("--pass", help="FILE.py:Class; repeatable.")] = None,
    skip: Annotated[Names, typer.Option(help="Leave this pass out; repeatable.")] = None,
    stop_after: Annotated[OptionalStr, typer.Option(help="End after this pass.")] = None,
    pass_limit: Annotated[OptionalInt, typer.Option(help="Run only so many passes.")] = None,
    allow_fewer: Annotated[
        Names, typer.Option(help="Accept fewer matches of this pass; repeatable.")
    ] = None,
    provider: Annotated[Names, typer.Option(help="OPERATOR=PROVIDER; repeatable.")] = None,
    check_numerics: Annotated[
        bool, typer.Option("--check-numerics", help="Compare logits after every pass.")
    ] = False,
    dump: Annotated[
        OptionalPath, typer.Option(help="Write graphs and diffs of every pass here.")
    ] = None,
    backend: Annotated[str, typer.Option(help="aoti, compile or eager.")] = "aoti",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model folder.")
    ] = False,
    revision: Annotated[OptionalStr, typer.Option(help="Revision of a hub model.")] = None,
    max_kl: Annotated[
        OptionalFloat, typer.Option(help="Fail above this KL divergence from the original.")
    ] = None,
    max_ppl_ratio: Annotated[
        OptionalFloat, typer.Option(help="Fail above this multiple of its perplexity.")
    ] = None,
    gate_text: Annotated[OptionalPath, typer.Option(help="UTF-8 text to measure both on.")] = None,
) -> None:
    """Compile a Hugging Face model into an artifact."""
    with reporting() as report:
        from smelt.compiler.api import Stopped, compile_model
        from smelt.runtime.machine import return_freed_memory

        return_freed_memory()
        artifact = compile_model(
            model,
            out,
            progress=report,
            quant=quant,
            format=format,
            group_size=group_size,
            kv_cache=kv_cache,
            features=features,
            alpha=alpha,
            activations=activations,
            bits=bits,
            dtype=dtype,
            device=device,
            calib=calib,
            calib_samples=calib_samples,
            calib_seqlen=calib_seqlen,
            opt=opt,
            passes=tuple(pass_ or ()),
            skip=tuple(skip or ()),
            stop_after=stop_after,
            pass_limit=pass_limit,
            allow_fewer=tuple(allow_fewer or ()),
            providers=tuple(_pair(text) for text in provider or ()),
            check_numerics=check_numerics,
            dump=dump,
            backend=backend,
            force=force,
            trust_remote_code=trust_remote_code,
            revision=revision,
            max_kl=max_kl,
            max_ppl_ratio=max_ppl_ratio,
            gate_text=gate_text,
        )
    if isinstance(artifact, Stopped):
        print_passes(artifact.passes)
        where = f"; graphs are in {dump}" if dump else "; add --dump DIR to see the graphs"
        print(f"stopped early as asked, no artifact was written{where}")
        return
    for line in summary(artifact.manifest):
        print(line)
    print(f"next: smelt chat {out}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UserError(f"--provider {text}: expected OPERATOR=PROVIDER")
    return name, value


def summary(manifest: Any) -> list[str]:
    """What a compilation made, in a few lines."""
    before, after = manifest.model["source_bytes"], manifest.memory["weights_bytes"]
    lines = [
        f"{manifest.model['class']}, {manifest.model['parameters'] / 1e6:.1f} M parameters, "
        f"compiled in {manifest.build['seconds']:.0f} s",
        f"weights {size(before)} -> {size(after)} ({before / after:.2f}x smaller)",
    ]
    if "kl" in manifest.quality:
        q = manifest.quality
        lines.append(
            f"against the original on {q['tokens']} tokens: KL {q['kl']:.2g}, "
            f"top-1 agreement {q['top1']:.1%}"
        )
    if "decode_tokens_per_s" in manifest.speed:
        s = manifest.speed
        lines.append(
            f"decodes {s['decode_tokens_per_s']:.0f} tokens/s, "
            f"{s['bound_fraction']:.0%} of what the memory's bandwidth allows"
        )
    for record in manifest.passes:
        for note in record.get("notes", []):
            if "summary" in note:
                lines.append(str(note["summary"]))
    return lines


def size(count: float) -> str:
    """Bytes for people: "1.50 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
