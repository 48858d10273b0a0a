"""`smelt tune OUT`: tile sizes for this card, and the artifact compiled anew with them."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Artifact
from .progress import reporting


def command(
    artifact: Artifact,
    rebuild: Annotated[
        bool, typer.Option(help="Compile the artifact anew with what was found.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Time tile sizes of the Triton kernels for this artifact's shapes on this machine's GPU.

    What is faster than the shipped tables is kept in ~/.cache/smelt/tuned and serves every model
    compiled on this machine from then on.
    """
    with reporting() as report:
        from smelt.compiler.api import rebuild as compile_again
        from smelt.compiler.tune import tune
        from smelt.runtime import manifest

        found = tune(artifact, progress=lambda what: report(f"tune: {what}", 0, 1))
        faster = [each for each in found if each.after < each.before]
        if faster and rebuild:
            device = manifest.read(artifact).target["device"]
            compile_again(artifact, device=device, progress=report)
    if as_json:
        import json

        print(json.dumps({"kernels": [vars(each) for each in found], "faster": len(faster)}))
        return
    for each in found:
        gain = f"{each.before / each.after:.2f}x" if each in faster else "as shipped"
        print(f"{each.kernel:18} {each.shape:24} {each.after:9.4f} ms   {gain}")
    print(f"{len(faster)} of {len(found)} shapes are faster now")
