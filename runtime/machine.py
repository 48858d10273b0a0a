"""Facts about this machine: processor, caches, memory, compiler, versions. Nothing here raises."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of malloc.h
# Activations of a sample are some hundred KiB in small models. At 1 MiB they left holes in the heap
# that held a fifth more than calibration had planned.
_RETURNED_FROM = 1 << 18


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if name:
            return name
    return platform.processor() or platform.machine()


def return_freed_memory() -> None:
    """Have the C library give large freed blocks back at once, where it can be told to.

    glibc raises the size from which it does with every large block that is freed, up to 32 MiB, and
    keeps what is smaller: a process that makes and drops tensors then holds several times what it
    uses. Meant for processes of our own; it applies to all of the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library than glibc
    mallopt(_M_MMAP_THRESHOLD, _RETURNED_FROM)


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest processor cache; 0 where the system does not tell."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
            largest = max(largest, int(text.rstrip("KMG")) * unit)
        except (OSError, ValueError):
            continue
    return largest


def memory() -> tuple[int, int]:
    """(bytes of RAM, bytes that can be allocated now)."""
    import psutil

    found = psutil.virtual_memory()
    return int(found.total), int(found.available)


def peak_memory() -> int:
    """Most bytes of RAM this process has had resident, mapped files included; 0 where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def compiler() -> tuple[str, str] | None:
    """(command, version line) of the C++ compiler that smelt would use, None without one."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            version = _output([*command, "--version"])
            return name, version.splitlines()[0] if version else "version unknown"
    return None


def compiler_works(command: str) -> str:
    """Compile a few lines with OpenMP; the empty string if it works, else the first error line."""
    source = (
        "#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() < 1; }\n"
    )
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    source = (
        source
        if openmp
        else source.replace("#include <omp.h>\n", "").replace("omp_get_max_threads() < 1", "0")
    )
    call = [*shlex.split(command), "-x", "c++", "-fsyntax-only", *openmp, "-"]
    try:
        done = subprocess.run(call, input=source, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error).splitlines()[0]
    if done.returncode == 0:
        return ""
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), f"exit {done.returncode}")


def package_version(name: str) -> str | None:
    """The installed version of a Python package, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
