"""What a compilation is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelt.passes.base import Pass
from smelt.passes.quantize.spec import QuantSpec
from smelt.runtime.batch import FEATURES
from smelt.runtime.errors import UserError
from smelt.runtime.ops.cache_format import CACHE_FORMATS

from .gate import Gate
from .pipeline import OPT_LEVELS

BACKENDS = ("aoti", "compile", "eager")
DEVICES = ("cpu", "cuda")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class CompileOptions:
    """Options of `smelt compile` and `smelt.compile`, one field a flag.

    Raises UserError for an unknown value, naming the known ones.
    """

    quant: str = "none"
    format: str | None = None
    group_size: int | None = None
    kv_cache: str = "auto"
    features: str = "none"
    alpha: float | None = None
    activations: str | None = None
    bits: float | None = None
    dtype: str = "auto"
    device: str = "cpu"
    calib: str = "builtin"
    calib_samples: int = 128
    calib_seqlen: int = 512
    opt: str = "O2"
    passes: tuple[str | Pass, ...] = ()
    skip: tuple[str, ...] = ()
    stop_after: str | None = None
    pass_limit: int | None = None
    allow_fewer: tuple[str, ...] = ()
    providers: tuple[tuple[str, str], ...] = ()
    check_numerics: bool = False
    dump: Path | None = None
    backend: str = "aoti"
    force: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    gate_text: Path | None = None
    block_size: int = 16
    max_tokens: int = 2048
    spec: QuantSpec = field(init=False, default_factory=QuantSpec)
    gate: Gate = field(init=False, default_factory=Gate)

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, ("auto", *DTYPES))
        _one_of("--kv-cache", self.kv_cache, CACHE_FORMATS)
        _one_of("--features", self.features, FEATURES)
        if self.kv_cache != "auto" and "insert-kv-cache" in self.skip:
            raise UserError(
                f"--kv-cache {self.kv_cache} and --skip insert-kv-cache: without that pass there "
                "is no cache; drop one of them"
            )
        _one_of("--device", self.device, DEVICES)
        if self.check_numerics and self.device != "cpu":
            raise UserError(
                "--check-numerics computes on the host, where no kernel of --device "
                f"{self.device} runs; check with --device cpu, where the same passes come first"
            )
        _one_of("--opt", self.opt, OPT_LEVELS)
        _one_of("--backend", self.backend, BACKENDS)
        for name in ("calib_samples", "calib_seqlen", "block_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if self.pass_limit is not None and self.pass_limit < 0:
            raise UserError("--pass-limit must not be negative")
        extra: dict[str, Any] = {"format": self.format} if self.format else {}
        if self.group_size is not None:
            extra["group_size"] = self.group_size
        extra |= {"alpha": self.alpha, "activations": self.activations or "", "bits": self.bits}
        object.__setattr__(self, "spec", QuantSpec(self.quant, **extra))
        text = None if self.gate_text is None else Path(self.gate_text)
        object.__setattr__(self, "gate", Gate(self.max_kl, self.max_ppl_ratio, text))
        if self.gate and self.partial:
            raise UserError("a quality gate needs an artifact, and the pipeline is cut short")
        if self.dump is not None:
            object.__setattr__(self, "dump", Path(self.dump))

    @property
    def lossy(self) -> bool:
        """Whether information is dropped: weights or the cache are quantized."""
        return self.spec.method != "none" or self.kv_cache != "auto"

    @property
    def partial(self) -> bool:
        """Whether the pipeline is cut short, so that no artifact comes out."""
        return self.stop_after not in (None, "choose-providers") or self.pass_limit is not None


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value}: expected one of {', '.join(known)}")
