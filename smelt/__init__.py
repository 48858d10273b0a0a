"""smelt: compiles a Hugging Face causal LM into a fast artifact, and runs it.

    artifact = smelt.compile("path or hub name", "OUT", quant="awq")
    llm = smelt.load("OUT")
    outputs = llm.generate(["Once upon a time"], smelt.SamplingParams(max_tokens=64))

Names are imported when first used: running an artifact never imports the compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.api import Artifact
    from .compiler.api import compile_model as compile
    from .compiler.export import export
    from .passes.base import Pass
    from .runtime.async_engine import AsyncEngine
    from .runtime.engine import Engine
    from .runtime.errors import SmeltError, UserError
    from .runtime.llm import LLM
    from .runtime.outputs import Output
    from .runtime.sampling_params import SamplingParams
    from .runtime.structured import Structured

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": ("compiler.api", "Artifact"),
    "Engine": ("runtime.engine", "Engine"),
    "LLM": ("runtime.llm", "LLM"),
    "AsyncEngine": ("runtime.async_engine", "AsyncEngine"),
    "Output": ("runtime.outputs", "Output"),
    "Pass": ("passes.base", "Pass"),
    "SamplingParams": ("runtime.sampling_params", "SamplingParams"),
    "SmeltError": ("runtime.errors", "SmeltError"),
    "Structured": ("runtime.structured", "Structured"),
    "UserError": ("runtime.errors", "UserError"),
    "compile": ("compiler.api", "compile_model"),
    "export": ("compiler.export", "export"),
}

__all__ = [
    "LLM",
    "Artifact",
    "AsyncEngine",
    "Engine",
    "Output",
    "Pass",
    "SamplingParams",
    "SmeltError",
    "Structured",
    "UserError",
    "__version__",
    "compile",
    "export",
    "load",
]


def load(path: str | Path, **options: Any) -> LLM:
    """Open an artifact for generation.

    options, all by name: kv_cache_tokens (tokens the KV cache holds over all sequences) or
    kv_cache_fraction (of the free memory; 0.4 if neither is given); draft ("ngram", the folder of a
    smaller artifact, "medusa:FOLDER" or "eagle3:FOLDER") and draft_tokens; deterministic;
    prefix_cache; policy; max_tokens (of a step): see `EngineOptions`. An artifact made for another
    machine or torch version is rebuilt in place from its portable program, with a notice. Raises
    UserError or SmeltError.
    """
    from .runtime.errors import TargetMismatch
    from .runtime.llm import load as open_llm

    try:
        return open_llm(path, **options)
    except TargetMismatch as mismatch:
        print(f"smelt: {path}: {mismatch}; rebuilding it for this machine", file=sys.stderr)
    from .compiler.api import rebuild

    rebuild(Path(path))
    return open_llm(path, **options)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'smelt' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
