"""What a machine can execute, and whether it covers what native code was compiled for."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

# GCC's and Clang's macros for an enabled instruction set, and the kernel's name of it in
# /proc/cpuinfo. Everything -march=native can turn on and user code can be compiled into.
MACROS = {
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__SSE4A__": "sse4a",
    "__POPCNT__": "popcnt",
    "__AVX__": "avx",
    "__AVX2__": "avx2",
    "__FMA__": "fma",
    "__F16C__": "f16c",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__LZCNT__": "abm",
    "__MOVBE__": "movbe",
    "__AES__": "aes",
    "__PCLMUL__": "pclmulqdq",
    "__SHA__": "sha_ni",
    "__ADX__": "adx",
    "__RDRND__": "rdrand",
    "__RDSEED__": "rdseed",
    "__GFNI__": "gfni",
    "__VAES__": "vaes",
    "__VPCLMULQDQ__": "vpclmulqdq",
    "__CLWB__": "clwb",
    "__CLFLUSHOPT__": "clflushopt",
    "__PRFCHW__": "3dnowprefetch",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512CD__": "avx512cd",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AVX512VP2INTERSECT__": "avx512_vp2intersect",
    "__AMX_TILE__": "amx_tile",
    "__AMX_INT8__": "amx_int8",
    "__AMX_BF16__": "amx_bf16",
    "__AMX_FP16__": "amx_fp16",
    "__ARM_FEATURE_DOTPROD": "asimddp",
    "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_SVE2": "sve2",
    "__ARM_FEATURE_BF16": "bf16",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp",
}


@cache
def machine() -> str:
    """Operating system and processor family, "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


@cache
def available() -> frozenset[str]:
    """Instruction sets of this machine by the kernel's names; empty where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def compiled_for(compiler: str = "g++") -> list[str]:
    """Instruction sets that `compiler -march=native` may use here, by the kernel's names.

    Falls back to everything the machine has when the compiler cannot be asked.
    """
    known = set(MACROS.values()) & available()
    try:
        command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
        macros = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return sorted(known)
    defined = {line.split()[1] for line in macros.stdout.splitlines() if line.startswith("#define")}
    return sorted({flag for macro, flag in MACROS.items() if macro in defined})


def missing(required: list[str]) -> list[str]:
    """Those of `required` that this machine lacks; none where the machine does not tell."""
    have = available()
    return sorted(set(required) - have) if have else []


# What each set of our kernels needs of the processor, the best last: as in kernels/cpu/isa.cpp.
_SETS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx_tile", "amx_bf16", "amx_int8"},
}


def kernel_set() -> str | None:
    """The set of our C++ kernels that runs on this machine, without loading them; None where the
    machine does not tell. SMELT_CPU_ISA names another of those that it has."""
    if not available():
        return None
    sets = ["baseline"]
    for name, needs in _SETS.items():
        if not needs <= available():
            break
        sets.append(name)
    wanted = os.environ.get("SMELT_CPU_ISA", "")
    return wanted if wanted in sets else sets[-1]
