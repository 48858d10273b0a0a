"""The linears that a checkpoint holds for each expert of a layer, by the model's stacked weights.

transformers 5 keeps gate_up [E, 2I, K] and down [E, K, I] of all experts as two parameters; its
conversions say which linears of a checkpoint they are put together from. Read backwards, they name
those linears.
"""

from __future__ import annotations

from typing import Any

from .weights import conversions


def expert_names(model: Any, parameter: str, experts: int) -> list[list[str]] | None:
    """The module paths of a stacked weight's linears, for each of `experts` in the order of its
    rows: gate and up, or down alone.

    model: the skeleton, asked for its class's conversions. None where they do not say.
    """
    renamings, converters = conversions(model)
    for converter in converters:
        for target in converter.target_patterns:
            kinds = [type(operation).__name__ for operation in converter.operations]
            if not parameter.endswith(target) or kinds[:1] != ["MergeModulelist"]:
                continue
            if kinds[1:] not in ([], ["Concatenate"]):
                return None
            stem = parameter.removesuffix(target)
            patterns = [p.removesuffix(".weight") for p in converter.source_patterns]
            if any(pattern.count("*") != 1 for pattern in patterns):
                return None
            return [
                [_as_stored(stem + p.replace("*", str(e)), renamings) for p in patterns]
                for e in range(experts)
            ]
    return None


def stored_name(model: Any, name: str) -> str:
    """A parameter's name in a checkpoint, as far as transformers only puts a word for another."""
    return _as_stored(name, conversions(model)[0])


def _as_stored(path: str, renamings: list[Any]) -> str:
    """A module path before transformers renamed it, where that is one plain word for another."""
    for renaming in reversed(renamings):
        sources, targets = renaming.source_patterns, renaming.target_patterns
        if len(sources) == len(targets) == 1 and targets[0] in path:
            before = path.replace(targets[0], sources[0], 1)
            if renaming.rename_source_key(before)[0] == path:
                path = before
    return path
