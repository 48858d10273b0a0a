"""Random answers that follow a grammar, without a model: noise that would rather come to an end."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from helpers.data import ROOT, data_path

from smelt.runtime.sampler import Row, SamplerState, prepare, sample
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.structured import Structured
from smelt.runtime.structured_compiler import CompiledGrammar, GrammarCompiler
from smelt.runtime.tokenizer import Tokenizer
from smelt.runtime.vocabulary import token_bytes

DEMO = ROOT / "models" / "demo" / "smelt-demo"
DEMO_SIZE, DEMO_END = 1056, 4  # more logits than the tokenizer has tokens: 1,024
BACKENDS = ("xgrammar", "llguidance")


@cache
def demo_compiler() -> GrammarCompiler:
    """One for all tests of a process: starting its processes takes seconds."""
    return GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END], seconds=20.0)


def closing_bias(tokenizer: Tokenizer, vocab_size: int, ends: list[int]) -> torch.Tensor:
    """float32 [V]: tokens that close something are likely, spaces and escapes are not."""
    bias = torch.zeros(vocab_size)
    for token, text in enumerate(token_bytes(tokenizer)[:vocab_size]):
        if not text:
            continue
        bias[token] -= min(len(text), 8)
        if text in (b'"', b"}", b"]", b'"}', b'"]'):
            bias[token] += 9
        if any(byte in b" \t\r\n\\" or byte > 127 for byte in text):
            bias[token] -= 8
    bias[ends] = 14
    return bias


def answers(
    grammar: CompiledGrammar,
    tokenizer: Tokenizer,
    vocab_size: int,
    ends: list[int],
    *,
    count: int = 3,
    most: int = 120,
    seed: int = 0,
) -> list[str | None]:
    """Texts of `count` random answers; None for one that had not ended after `most` tokens."""
    make = torch.Generator().manual_seed(seed)
    bias = closing_bias(tokenizer, vocab_size, ends)
    params = SamplingParams(temperature=1.0, seed=seed)
    rows = [
        Row(SamplerState(params, 1, ends, matcher=grammar.matcher(), index=i), [0])
        for i in range(count)
    ]
    for _ in range(most):
        running = [row for row in rows if not row.state.finished]
        if not running:
            break
        prepared = prepare(running, vocab_size, torch.device("cpu"))
        logits = torch.randn(len(running), vocab_size, generator=make) * 2 + bias
        for row, token in zip(running, sample(logits, running, prepared), strict=True):
            matcher = row.state.matcher
            assert token is not None, matcher and matcher.error
            row.history.append(token)
            row.state.accept([token])
    return [tokenizer.decode(r.history[1:]) if r.state.finished else None for r in rows]


def demo_answers(spec: Structured, **options: Any) -> list[str | None]:
    """The same with the demo's vocabulary."""
    compiler = demo_compiler()
    grammar = compiler.compile(spec)
    return answers(grammar, Tokenizer(DEMO), DEMO_SIZE, [DEMO_END], **options)


def suite_schemas(draft: str) -> Iterator[tuple[str, Any]]:
    """(name, schema) of the JSON Schema test suite's required tests."""
    with tarfile.open(data_path("schemas/JSON-Schema-Test-Suite.tar.xz")) as archive:
        for member in archive.getmembers():
            parts = member.name.split("/")
            if parts[1:3] != ["tests", draft] or len(parts) != 4 or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            for case in json.load(file):
                yield f"{parts[-1]}: {case['description']}", case["schema"]


# Which type a keyword is about.
_TYPES = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "contains", "uniqueItems"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "dependentRequired",
    ),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def typed(schema: Any) -> Any:
    """The schema with the types that its keywords are about, so that an answer has to heed them."""
    if isinstance(schema, list):
        return [typed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    nested = ("properties", "patternProperties", "$defs", "definitions")
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in nested and isinstance(value, dict):
            found[name] = {key: typed(part) for key, part in value.items()}
        elif name in ("const", "enum", "default", "required"):
            found[name] = value
        else:
            found[name] = typed(value)
    kinds = [kind for kind, words in _TYPES.items() if any(word in schema for word in words)]
    if "type" not in schema and len(kinds) == 1:
        found["type"] = kinds[0]
    return found


def referring(rng: random.Random) -> dict[str, Any]:
    """A random schema that refers to parts of itself, one of them endlessly deep."""
    tree = {
        "type": "object",
        "properties": {
            "value": random_schema(rng, 1),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema as applications write them: nested objects and lists with bounds."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth:
        kinds += ["object", "object", "object", "array", "array", "anyOf"]
    kind = rng.choice(kinds)
    low, extra = rng.randint(-30, 30), rng.randint(0, 200)
    if kind == "string":
        return rng.choice([{}, {"minLength": 2}, {"maxLength": 3}]) | {"type": "string"}
    if kind == "integer":
        bounds = [{}, {"minimum": low}, {"exclusiveMaximum": low}]
        return {"type": "integer"} | rng.choice([*bounds, {"minimum": low, "maximum": low + extra}])
    if kind == "number":
        bounds = [{}, {"minimum": low / 4}, {"exclusiveMinimum": 0, "maximum": 1.5}]
        return {"type": "number"} | rng.choice(bounds)
    if kind == "enum":
        values = ["red", 'a "b"', "ü\n", "", 3, -1.5, True, None]
        return {"enum": rng.sample(values, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False, None, [1, {"a": []}]])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": rng.choice(["^[A-Z]{3}$", "^(a|bc)+$", "^[0-9]{1,4}$"]),
        }
    if kind == "object":
        names = rng.sample(["id", "name", "a b", "ключ", 'x"y', "tags", "n"], rng.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
            "additionalProperties": False,
        }
    if kind == "array":
        most = rng.randint(1, 3)
        bounds = rng.choice([{}, {"minItems": 1}, {"minItems": most, "maxItems": most + 1}])
        return {"type": "array", "items": random_schema(rng, depth - 1)} | bounds
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}
