"""`smelt doctor`: what this machine has, what smelt can do on it, and what would make it better."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smelt.runtime import isa, machine
from smelt.runtime.integrity import cache_folder

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "triton", "torchao")
# Instruction sets that decide which kernels run; the others change little.
TOLD = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
INSTALL_COMPILER = {
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "zypper": "sudo zypper install gcc-c++",
    "apk": "apk add g++",
    "brew": "xcode-select --install",
}
# Below this, artifacts of larger models and torch's own caches soon find the disk full.
LOW_DISK = 4 << 30


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """What this machine has and what smelt can do on it."""
    found = examine()
    if as_json:
        import json

        print(json.dumps(found))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for line in report(found):
        console.print(line, markup=False, soft_wrap=True)


def examine() -> dict[str, Any]:
    """{"machine", "software", "can", "problems"}. A part that cannot be found out says why."""
    hardware = _machine()
    software = _software()
    can = abilities(hardware, software)
    return {
        "machine": hardware,
        "software": software,
        "can": can,
        "problems": problems(hardware, software),
    }


def _machine() -> dict[str, Any]:
    total, available = machine.memory()
    have = isa.available()
    folder = cache_folder()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": machine.cpu_model(),
        "cores": machine.usable_cores(),
        "instruction_sets": [name for name in TOLD if name in have],
        "last_level_cache_bytes": machine.last_level_cache(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "cache_folder": str(folder),
        "cache_free_bytes": _disk_free(folder),
        "cuda": _cuda(),
    }


def _disk_free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _cuda() -> list[dict[str, Any]]:
    """CUDA devices that torch can use."""
    try:
        import torch

        if not torch.cuda.is_available():
            return []
        return [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": list(torch.cuda.get_device_capability(i)),
                "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
            }
            for i in range(torch.cuda.device_count())
        ]
    except Exception as error:  # a broken driver raises many things, and none may stop the doctor
        return [{"name": f"not usable: {error}", "capability": [], "memory_bytes": 0}]


def _software() -> dict[str, Any]:
    found = machine.compiler()
    compiler = None
    if found is not None:
        command, version = found
        compiler = {"command": command, "version": version, "error": _try(command)}
    try:
        import torch

        threads, build = torch.get_num_threads(), str(torch.__version__)
    except Exception as error:
        threads, build = 0, f"torch cannot be imported: {error}"
    return {
        "python": platform.python_version(),
        "packages": {name: machine.package_version(name) for name in PACKAGES},
        "torch_build": build,
        "torch_threads": threads,
        "compiler": compiler,
        "nvidia_driver": shutil.which("nvidia-smi") is not None,
        "kernels": _kernels(),
    }


def _try(command: str) -> str | None:
    return machine.compiler_works(command) or None


def _kernels() -> dict[str, Any]:
    """Whether the CPU kernels are compiled, and for which instruction set they run here."""
    try:
        from smelt.runtime.kernels import build

        path = cache_folder() / "kernels" / build._key() / "smelt_cpu.so"
        if not path.is_file():
            return {"compiled": False, "path": str(path), "isa": None}
        return {"compiled": True, "path": str(path), "isa": build.active_isa()}
    except Exception as error:
        return {"compiled": False, "path": None, "isa": None, "error": str(error)}


def abilities(hardware: dict[str, Any], software: dict[str, Any]) -> dict[str, Any]:
    """What works here, with the reason where something does not."""
    compiler = software["compiler"]
    works = compiler is not None and not compiler["error"]
    if works:
        why = f"{compiler['command']} compiles"
    elif compiler is None:
        why = "no C++ compiler; finished artifacts of such a machine still run here"
    else:
        why = f"{compiler['command']} does not compile: {compiler['error']}"
    if software["kernels"]["compiled"]:
        kernels = f"C++ kernels, {software['kernels']['isa']}"
    elif works:
        kernels = "C++ kernels, compiled when first needed (about a minute)"
    else:
        kernels = "torch's own operators (slower)"
    backends = ["aoti", "compile", "eager"] if works else ["eager"]
    cuda = [d for d in hardware["cuda"] if d["capability"]]
    return {
        "aoti": works,
        "aoti_reason": why,
        "backends": backends,
        "devices": ["cpu", *(["cuda"] if cuda else [])],
        "cpu_kernels": kernels,
        "quantization": _quantization(),
        "fastest": _fastest(hardware, works, bool(cuda)),
    }


def _quantization() -> list[str]:
    """Every method with each of its formats."""
    from smelt.passes.quantize.spec import METHODS

    pairs = [f"{method} {form}" for method, formats in METHODS.items() for form in formats]
    return ["none", *pairs]


def _fastest(hardware: dict[str, Any], works: bool, cuda: bool) -> str:
    if cuda:
        return "smelt compile MODEL -o OUT --device cuda, with --quant awq for the smallest"
    if not works:
        return "smelt compile MODEL -o OUT --backend eager (slow; install a C++ compiler)"
    small = "--quant awq"
    if not {"avx2", "asimd"} & set(hardware["instruction_sets"]):
        return f"smelt compile MODEL -o OUT {small} (plain C++ kernels: no AVX2 here)"
    return f"smelt compile MODEL -o OUT {small} (int4 reads the fewest bytes a token)"


def problems(hardware: dict[str, Any], software: dict[str, Any]) -> list[dict[str, str]]:
    """What is missing or wrong, and the command that mends it."""
    found: list[dict[str, str]] = []

    def add(problem: str, fix: str) -> None:
        found.append({"problem": problem, "fix": fix})

    compiler = software["compiler"]
    if compiler is None:
        add("no C++ compiler: nothing can be compiled with AOTInductor", _install_compiler())
    elif compiler["error"]:
        add(f"{compiler['command']} does not work: {compiler['error']}", _install_compiler())
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        if software["packages"][name] is None:
            add(f"the package {name} is missing", f"{sys.executable} -m pip install {name}")
    if software["packages"]["torchao"] is None:
        add(
            "torchao is missing: checkpoints that it quantized cannot be read (optional)",
            f"{sys.executable} -m pip install 'smelt[torchao]'",
        )
    if software["nvidia_driver"] and not hardware["cuda"]:
        add(
            "there is an NVIDIA driver, but this torch finds no CUDA device",
            f"{sys.executable} -m pip install --force-reinstall torch  (a CUDA build)",
        )
    if hardware["cuda"] and software["packages"]["triton"] is None:
        add("triton is missing: no CUDA kernels", f"{sys.executable} -m pip install 'smelt[cuda]'")
    if hardware["cache_free_bytes"] < LOW_DISK:
        free = hardware["cache_free_bytes"] / 2**30
        add(
            f"only {free:.1f} GiB are free at {hardware['cache_folder']}",
            "free some, or set SMELT_CACHE to a folder on another disk",
        )
    if not os.access(_existing(Path(hardware["cache_folder"])), os.W_OK):
        add(
            f"{hardware['cache_folder']} cannot be written: kernels would be compiled each time",
            "set SMELT_CACHE to a folder you can write",
        )
    return found


def _existing(folder: Path) -> Path:
    return next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))


def _install_compiler() -> str:
    for tool, line in INSTALL_COMPILER.items():
        if shutil.which(tool):
            return line
    return "install g++ or clang++, or point CXX at one"


def report(found: dict[str, Any]) -> list[str]:
    """The examination as lines for people."""
    hardware, software, can = found["machine"], found["software"], found["can"]
    free, total = hardware["memory_available_bytes"], hardware["memory_bytes"]
    compiler = software["compiler"]
    lines = ["This machine"]
    rows = [
        ("system", f"{hardware['system']}, {hardware['architecture']}"),
        ("processor", f"{hardware['cpu']}, {hardware['cores']} cores usable"),
        ("instructions", " ".join(hardware["instruction_sets"]) or "not told by the system"),
        ("memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"),
        (
            "cache",
            f"{hardware['cache_folder']} ({hardware['cache_free_bytes'] / 2**30:.1f} GiB free)",
        ),
        ("compiler", f"{compiler['command']}: {compiler['version']}" if compiler else "none"),
        ("python", software["python"]),
    ]
    versions = (f"{name} {version or '-'}" for name, version in software["packages"].items())
    rows.append(("packages", ", ".join(versions)))
    devices = [f"{d['name']} {'.'.join(map(str, d['capability']))}" for d in hardware["cuda"]]
    rows.append(("CUDA", "; ".join(devices) or "no device"))
    lines += [f"  {name:<13} {text}" for name, text in rows]
    lines += ["", "What smelt can do here"]
    rows = [
        ("AOTInductor", f"{'yes' if can['aoti'] else 'no'}: {can['aoti_reason']}"),
        ("backends", ", ".join(can["backends"])),
        ("devices", ", ".join(can["devices"])),
        ("kernels", can["cpu_kernels"]),
        ("weights", ", ".join(can["quantization"])),
        ("fastest", can["fastest"]),
    ]
    lines += [f"  {name:<13} {text}" for name, text in rows]
    lines.append("")
    if not found["problems"]:
        return [*lines, "Nothing is missing."]
    lines.append("What is missing")
    for problem in found["problems"]:
        lines += [f"  {problem['problem']}", f"      {problem['fix']}"]
    return lines
