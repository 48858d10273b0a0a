"""A small complete manifest."""

from __future__ import annotations

from typing import Any

from smelt.runtime.batch import BatchLayout, CacheGroup, CacheSpec
from smelt.runtime.manifest import Manifest


def sample_spec() -> CacheSpec:
    """Three layers, the second with a sliding window and another head size."""
    groups = (CacheGroup("full", 0, (0, 2)), CacheGroup("window_8", 8, (1,)))
    return CacheSpec(16, "bfloat16", (2, 2, 4), (64, 32, 64), groups)


def sample_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": {"name": "sample", "vocab_size": 100, "eos_token_id": [2]},
        "quant": {"method": "none"},
        "target": {"device": "cpu", "machine": "linux-x86_64", "isa": ["avx2"], "torch": "2.13.0"},
        "backend": "aoti",
        "cache": sample_spec(),
        "layout": BatchLayout(64, 4, 8, 16, 128),
        "constants": {"w_a": "a"},
        "layout_steps": [],
        "passes": [{"name": "remove-noops", "matched": 3}],
        "providers": [{"where": "head", "operator": "linear", "provider": "cpu"}],
    }
    return Manifest(**{**values, **changes})
