"""`smelt export`: an artifact's weights as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .progress import reporting


def command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What to export.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")],
    format: Annotated[
        str, typer.Option(help="compressed-tensors (quantized weights as they are) or hf (plain).")
    ] = "compressed-tensors",
) -> None:
    """Write an artifact's weights as a Hugging Face folder."""
    with reporting() as report:
        from smelt.compiler.export import export

        done = export(artifact, out, format=format, progress=report)
    print(f"{done.folder}: {done.quantized} linears quantized, {done.plain} in 16 bit or more")
    for note in done.notes:
        print(f"note: {note}")
