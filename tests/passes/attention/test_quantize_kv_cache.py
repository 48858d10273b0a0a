"""quantize-kv-cache: the cache operator and its inputs change, what they mean hardly does."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.check_pass import check_pass, logits_of
from helpers.steps import Stepper
from helpers.tiny import Subject, Toy, after, program_of, tiny_program

from smelt.compiler.numerics import compare
from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.attention.quantize_kv_cache import QuantizeKvCache
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.dialect import DialectError, verify
from smelt.passes.program import Role
from smelt.passes.providers import ChooseProviders
from smelt.runtime.batch import CacheSpec
from smelt.runtime.errors import UserError
from smelt.runtime.ops.cache_format import QUANTIZED

from .test_kv_cache import Attending, D, G

BEFORE, AFTER = "smelt.cached_attention", "smelt.cached_attention_quantized"


def cached(*windows: int, **options: bool | float) -> Subject:
    return after(program_of(Attending(windows, **options)), InsertKvCache())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", QUANTIZED)
def test_caches_become_bytes_with_scales(name: str) -> None:
    found = check_pass(
        cached(0, 4),
        QuantizeKvCache(),
        before={BEFORE: 2, AFTER: 0},
        after={BEFORE: 0, AFTER: 2},
        matched=2,
        rewritten=2,
        options={"format": name},
        golden="quantize-kv-cache_two_layers" if name == "int8" else None,
    )
    spec = found.program.caches
    assert spec is not None
    assert (spec.format, spec.dtype, spec.heads, spec.head_sizes) == (
        *(name, "uint8"),
        *((G, G), (D, D)),
    )
    assert [group.window for group in spec.groups] == [0, 4]
    width = QUANTIZED[name].row_bytes(D)
    for cache in found.program.placeholders(Role.CACHE):
        assert len(cache.users) == 1
        value = cache.meta["val"]
        assert value.dtype == torch.uint8 and tuple(value.shape[1:]) == (2, 16, G, width)
        assert isinstance(value.shape[0], torch.SymInt)
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    (note,) = found.record["notes"]
    bytes_ = 2 * 2 * G * D * 4, 2 * 2 * G * width
    assert f"KV cache {name}: {bytes_[0]} -> {bytes_[1]} bytes a token" in note["summary"]


def test_softcap_and_sinks_are_handed_on() -> None:
    found = check_pass(
        cached(3, softcap=7.0, sinks=True), QuantizeKvCache(), before={}, after={AFTER: 1}
    )
    (node,) = found.program.calls(torch.ops.smelt.cached_attention_quantized.default)
    assert node.args[9:11] == (3, 7.0) and node.args[11] is not None and node.args[13] == "int8"


def test_a_program_without_caches_stays_as_it_is() -> None:
    subject = after(program_of(Toy()), InsertKvCache())
    found = check_pass(subject, QuantizeKvCache(), before={}, after={AFTER: 0}, matched=0)
    assert found.program.caches is None


def test_unknown_formats_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="no format 'int3'; it knows fp8, int8, int4"):
        QuantizeKvCache.options({"format": "int3"})
    with pytest.raises(UserError, match="no option 'bits'"):
        QuantizeKvCache.options({"bits": 8})


def test_another_reader_of_a_quantized_cache_is_refused() -> None:
    program = check_pass(cached(0), QuantizeKvCache(), before={}, after={}).program
    cache = program.input("kv_cache_0")
    (attention,) = program.calls(torch.ops.smelt.cached_attention_quantized.default)
    with program.graph.inserting_after(cache):
        program.call(torch.ops.aten.select.int, (cache, 1, 0), like=attention)
    with pytest.raises(DialectError, match="a cache read by something other than a cache operator"):
        verify(program)


@pytest.mark.parametrize(
    ("override", "provider"),
    [((), "cpu"), ((("cached_attention_quantized", "reference"),), "reference")],
)
def test_it_gets_a_provider(override: tuple[tuple[str, str], ...], provider: str) -> None:
    subject = after(cached(0), QuantizeKvCache())
    found = check_pass(
        subject, ChooseProviders(), before={AFTER: 1}, after={}, options={"overrides": override}
    )
    (note,) = [n for n in found.record["notes"] if n["operator"].startswith("cached")]
    assert note["operator"] == "cached_attention_quantized" and note["provider"] == provider
    suffix = "_reference" if provider == "reference" else ""
    target = getattr(torch.ops.smelt, "cached_attention_quantized" + suffix).default
    assert len(found.program.calls(target)) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_families(family: str) -> None:
    """Rounding a random model's cache moves its logits little, the coarser the more."""
    subject = after(tiny_program(family), RemoveNoops(), KeepLogitsRows(), InsertKvCache())
    layers = subject.program.facts.hidden_layers
    kl = {}
    for name in QUANTIZED:
        found = check_pass(
            subject,
            QuantizeKvCache(),
            before={BEFORE: layers},
            after={BEFORE: 0, AFTER: layers},
            options={"format": name},
        )
        kl[name] = compare(found.logits, subject.logits)["kl"]
    assert kl["int8"] < kl["fp8"] < kl["int4"] < 1e-2
    assert kl["int8"] < 1e-5


@pytest.mark.parametrize("name", QUANTIZED)
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    """Chunked prefill, decode and mixed steps read the same rounded rows as one prefill."""
    subject = cached(0, 4)
    options = {"format": name}
    program = check_pass(subject, QuantizeKvCache(), before={}, after={}, options=options).program
    weights = dict(program.weights.materialize(program.used_weights(), subject.source))
    ids = [torch.arange(29) * 7 % 37, torch.arange(21) * 5 % 37]
    pieces = Stepper(program, weights, ids)
    parts: list[list[torch.Tensor]] = [[], []]
    for chunks in ({0: 17}, {0: 1, 1: 9}, {1: 1, 0: 4}, {0: 7, 1: 11}):
        for b, logits in pieces.step(chunks).items():
            parts[b].append(logits)
    for b, sequence in enumerate(ids):
        whole = logits_of(program, subject.source, sequence)
        torch.testing.assert_close(torch.cat(parts[b]), whole, atol=1e-5, rtol=1e-5)
