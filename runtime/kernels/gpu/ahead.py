"""Compile a kernel for a device that is not here, and read from the result what it will use.

Triton compiles for any NVIDIA target without a GPU; the tools its package carries say how many
registers a kernel takes and which instructions its loops are made of. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Variant
from .roofline import CARDS

# Matrix instructions in PTX: mma.sync before Hopper and on consumer Blackwell, wgmma on Hopper,
# tcgen05 on data-centre Blackwell.
_MATRIX = re.compile(r"^\s*(?:@\S+\s+)?(mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.\w:]*", re.M)
# A copy of 16 bytes a thread: a vector load, an asynchronous copy, or the bulk copy engine.
_WIDE = re.compile(
    r"ld\.global[.\w:]*\.v4\.[bfus]32|ld\.global[.\w:]*\.v2\.[bfus]64|"
    r"ld\.global[.\w:]*\.v8\.[bfus]32|cp\.async\.c[ga]\.shared\.global[^;]*0x10|"
    r"cp\.async\.bulk\.tensor|ld\.global[.\w:]*\.b128"
)
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """registers: of a thread. spilled: bytes of a thread in local memory. shared: bytes of a block.
    matrix: kinds of tensor-core instruction. wide_loads: whether 16 bytes are loaded at once."""

    registers: int
    spilled: int
    shared: int
    matrix: tuple[str, ...]
    wide_loads: bool


def compile_for(variant: Variant, capability: int) -> Usage:
    """Compile `variant` for capability 80, 90, 100, ...; raises what triton raises."""
    names = variant.kernel.arg_names
    constants = {**variant.constants, **variant.config.constants}
    signature = {n: "constexpr" if n in constants else variant.signature[n] for n in names}
    at = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={at[name]: value for name, value in constants.items() if name in at},
        attrs={at[name]: [["tt.divisibility", 16]] for name in names if name in variant.aligned},
    )
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    return Usage(
        registers,
        spilled,
        int(made.metadata.shared),
        tuple(sorted(set(_MATRIX.findall(ptx)))),
        _WIDE.search(ptx) is not None,
    )


def complaint(variant: Variant, usage: Usage, capability: int) -> str | None:
    """What is wrong with a compiled kernel; None when it is as it was meant."""
    limit = min(card.shared for card in CARDS.values() if card.capability == capability)
    if usage.shared > limit:
        return f"{usage.shared} bytes of shared memory, {limit} are there"
    if variant.hot and usage.spilled:
        return f"{usage.spilled} bytes a thread spill to local memory"
    if variant.tensor_cores and not usage.matrix:
        return "no tensor-core instruction"
    if variant.wide_loads and not usage.wide_loads:
        return "no loads of 16 bytes"
    return None


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = _USAGE.search(text)
    if found is None:
        raise RuntimeError(f"{tool.name} says nothing of registers: {text.strip()[:200]}")
    registers, stack, _, local = map(int, found.groups())
    return registers, max(stack, local)
