"""Compile the C++ CPU kernels once, cache the library, and load it.

`load()` is all that callers need: after it the smelt:: operators that have a kernel run it for CPU
tensors. The library holds kernels for every x86-64 instruction set we know and picks at load, so a
file built on one machine runs on another with the same torch version. torch.utils.cpp_extension is
not used: it imports setuptools.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .. import ops  # noqa: F401  # defines the operators that the library implements
from ..errors import SmeltError, UserError
from ..integrity import cache_folder

SOURCES = Path(__file__).parent / "cpu"
TORCH_UNITS = ("ops_linear.cpp", "ops_attention.cpp", "ops_w8a8.cpp", "ops_experts.cpp")
COMMON_FLAGS = ("-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w")
# What calls torch has no loops of its own; kernels are worth the time that compiling them takes,
# but for the plainest set where every processor of the last ten years has a better one.
TORCH_LEVEL, KERNEL_LEVEL, PLAINEST_LEVEL = "-O2", "-O3", "-O2"
AVX2_FLAGS = ("-DSMELT_AVX2", "-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (
    *("-DSMELT_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
)
VNNI_FLAGS = (*AVX512_FLAGS, "-DSMELT_AVX512_VNNI", "-mavx512vnni")
BF16_FLAGS = (*VNNI_FLAGS, "-DSMELT_AVX512_BF16", "-mavx512bf16")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_vnni": VNNI_FLAGS,
    "avx512_bf16": BF16_FLAGS,
    "amx_bf16": (*BF16_FLAGS, "-DSMELT_AMX", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _compiler() -> list[str]:
    """The C++ compiler's command. Raises UserError when there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise UserError(
        "the CPU kernels need a C++ compiler and none was found: install g++ or clang++, or point "
        "CXX at one (without them smelt runs on torch's own operators, more slowly)"
    )


def _torch_flags() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    includes = [root, root / "torch" / "csrc" / "api" / "include"]
    flags = ["-std=c++20", *(f"-isystem{path}" for path in includes)]
    if sys.platform != "darwin":
        # at::parallel_for is sequential without it; the functions come with libtorch_cpu.
        flags.append("-fopenmp")
    return [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def _units() -> list[tuple[str, list[str]]]:
    """(object name, arguments) of each compilation, the longest first."""
    sets = ISA_FLAGS if _is_x86() else {"baseline": ()}
    x86 = ["-DSMELT_X86"] if _is_x86() else []
    units = [(Path(name).stem, [name, TORCH_LEVEL, *_torch_flags()]) for name in TORCH_UNITS]
    for name, flags in sets.items():
        level = PLAINEST_LEVEL if x86 and not flags else KERNEL_LEVEL
        units.append((name, ["unit.cpp", "-std=c++20", level, f"-DSMELT_ISA={name}", *flags]))
    units.append(("isa", ["isa.cpp", "-std=c++17", *x86]))
    return units


def _link_flags() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    # Unresolved names (OpenMP's) are found in what libtorch_cpu brings: one thread pool, torch's.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return ["-shared", *undefined, f"-L{folder}", "-ltorch_cpu", "-lc10"]


def _key() -> str:
    """Hash of all that the library's contents follow from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    facts = (
        [COMMON_FLAGS, ISA_FLAGS, TORCH_LEVEL, KERNEL_LEVEL, PLAINEST_LEVEL],
        torch.__version__,
        platform.machine(),
        sys.platform,
        torch.compiled_with_cxx11_abi(),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot run the C++ compiler {command[0]!r}: {error.strerror}") from error
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    raise SmeltError(
        f"{command[0]} could not build the CPU kernels: {first or f'exit {done.returncode}'}"
    )


def _build(to: Path) -> None:
    compiler = _compiler()
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix="build-") as name:
        folder = Path(name)
        objects: list[str] = []
        commands: list[list[str]] = []
        for stem, (source, *flags) in _units():
            objects.append(f"{stem}.o")
            commands.append(
                [*compiler, "-c", str(SOURCES / source), *COMMON_FLAGS, *flags, "-o", objects[-1]]
            )
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda command: _run(command, folder), commands))
        _run([*compiler, *objects, *_link_flags(), "-o", to.name], folder)
        # Two processes may build at once: each in its own folder, and the last replaces its equal.
        os.replace(folder / to.name, to)


def library_path() -> Path:
    """The compiled library, built now if the cache does not have it.

    Raises SmeltError with the compiler's first error, UserError where there is no compiler.
    """
    path = cache_folder() / "kernels" / _key() / "smelt_cpu.so"
    if not path.exists():
        _build(path)
    return path


@functools.cache
def _load_once() -> dict[str, Path]:
    return {}


def load(path: Path | None = None) -> None:
    """Load the kernels into this process, once; `path` names a library to use instead of ours."""
    loaded = _load_once()
    if "library" in loaded:
        return
    library = path or library_path()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise SmeltError(f"cannot load the CPU kernels {library}: {error}") from error
    loaded["library"] = library


def active_isa() -> str:
    """Name of the instruction set whose kernels run; loads the library."""
    load()
    library = ctypes.CDLL(str(_load_once()["library"]))
    library.smelt_cpu_isa.restype = ctypes.c_char_p
    name = library.smelt_cpu_isa()
    return str(name.decode())
