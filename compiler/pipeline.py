"""`pipeline()`: the whole list of passes for a configuration, on one page."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from smelt.passes.attention.expose_features import ExposeFeatures
from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.attention.quantize_kv_cache import QuantizeKvCache
from smelt.passes.attention.rope_lengths import InsertRopeLengths
from smelt.passes.base import Pass
from smelt.passes.canonical.gated_activation import CanonicalizeGatedActivation
from smelt.passes.canonical.layer_norm import CanonicalizeLayerNorm
from smelt.passes.canonical.linear import CanonicalizeLinear
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rms_norm import CanonicalizeRmsNorm
from smelt.passes.canonical.rope import CanonicalizeRope
from smelt.passes.canonical.simplify_views import SimplifyViews
from smelt.passes.fusion.epilogues import FuseEpilogues
from smelt.passes.fusion.linears import FuseLinears
from smelt.passes.fusion.quantized_inputs import FuseQuantizedInputs
from smelt.passes.fusion.rope_write import FuseRopeWrite
from smelt.passes.providers import ChooseProviders
from smelt.runtime.errors import UserError

from .manager import Stage

OPT_LEVELS = ("O0", "O1", "O2")


@dataclass(frozen=True)
class PipelineConfig:
    """What decides the list of passes. quantize: the quantization pass and its options, or None.

    kv_cache: the cache's format, "auto" for the model's dtype. features: the step's second output,
    "none" for none.
    O0 is correct and fuses nothing; O1 canonicalises; O2 fuses too.
    """

    opt: str = "O2"
    quantize: Stage | None = None
    extra: tuple[Pass, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kv_cache: str = "auto"
    features: str = "none"


def pipeline(config: PipelineConfig) -> list[Stage]:
    """The passes in order. Raises UserError for an unknown level or unknown options."""
    if config.opt not in OPT_LEVELS:
        raise UserError(f"no optimisation level {config.opt!r}; known: {', '.join(OPT_LEVELS)}")
    level = OPT_LEVELS.index(config.opt)

    def stage(pass_: Pass) -> Stage:
        return Stage(pass_, pass_.options(config.options.get(pass_.name, {})))

    canonical: list[Pass] = [RemoveNoops(), CanonicalizeLinear()]
    if level >= 1 or config.quantize is not None:
        canonical += [
            CanonicalizeRmsNorm(),
            CanonicalizeLayerNorm(),
            CanonicalizeRope(),
            SimplifyViews(),
            CanonicalizeGatedActivation(),
        ]
    stages = [stage(pass_) for pass_ in canonical]
    if level >= 2:
        stages.append(stage(FuseLinears()))
    stages += [stage(pass_) for pass_ in config.extra]
    if config.quantize is not None:
        stages.append(config.quantize)
    stages.append(stage(KeepLogitsRows()))
    if config.features != "none":
        exposed = ExposeFeatures()
        stages.append(Stage(exposed, exposed.options({"kind": config.features})))
    stages += [stage(InsertKvCache()), stage(InsertRopeLengths())]
    if config.kv_cache != "auto":
        quantized = QuantizeKvCache()
        stages.append(Stage(quantized, quantized.options({"format": config.kv_cache})))
    stages.append(stage(ChooseProviders()))
    if level >= 2:
        fused: list[Pass] = [FuseEpilogues(), FuseRopeWrite(), FuseQuantizedInputs()]
        stages += [stage(pass_) for pass_ in fused]
    known = {s.pass_.name for s in stages}
    for name in config.options:
        if name not in known:
            raise UserError(f"options for {name}, which is not in this pipeline")
    return stages


def portable_stages(stages: list[Stage]) -> tuple[list[Stage], list[Stage]]:
    """(passes up to the portable program, passes that bind it to a target)."""
    at = next(i for i, s in enumerate(stages) if isinstance(s.pass_, ChooseProviders))
    return stages[:at], stages[at:]


def load_pass(spec: str) -> Pass:
    """A third-party pass from FILE.py:Class. Raises UserError when it is not there or no Pass."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"--pass {spec}: expected FILE.py:Class, and {file or spec} is no file")
    module_spec = importlib.util.spec_from_file_location(f"smelt_user_pass_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--pass {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--pass {spec}: {path} fails to load: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, Pass):
        raise UserError(f"--pass {spec}: {path} has no subclass of smelt.Pass named {name}")
    return found()


def installed_passes() -> list[Pass]:
    """Passes that other packages offer under the entry point smelt.passes."""
    return [entry.load()() for entry in entry_points(group="smelt.passes")]
