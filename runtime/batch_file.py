"""A file of requests in, a file of answers out: resumable, one JSON object a line.

A line is {"prompt": text} or {"messages": [...]} or {"token_ids": [...]}, with an optional "id" and
any fields of `SamplingParams`; the answer's line has the same "id", or the line's number.
Answers are appended as they come, in their order of completion; what stands in the output already
is not computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import UserError
from .llm import LLM, Prompt
from .outputs import Output
from .sampling_params import SamplingParams

PROMPTS = ("prompt", "messages", "token_ids")
_FIELDS = {f.name for f in fields(SamplingParams)} - {"structured"}


@dataclass
class Summary:
    """What a run did. seconds: of this run alone; failed: answers that hold an error."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    def add(self, output: Output) -> None:
        self.done += 1
        self.failed += output.error is not None
        self.prompt_tokens += output.prompt_tokens
        self.generated_tokens += sum(len(c.token_ids) for c in output.outputs)
        if output.ttft_s:
            self.ttft_s.append(output.ttft_s)
        if output.decode_tokens_per_s:
            self.itl_s.append(1 / output.decode_tokens_per_s)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie, 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class BatchFile:
    """The requests of `source` that `target` has no answer to.

    defaults: parameters that a line does not name. Every line is checked before anything runs;
    raises `UserError` with file and line number.
    """

    def __init__(self, source: Path, target: Path, defaults: SamplingParams) -> None:
        self.source, self.target, self.defaults = source, target, defaults
        if source.resolve() == target.resolve():
            raise UserError(f"--input and --output are both {source}: write to another file")
        self.requests = self._read()
        self.finished = self._finished()

    @property
    def remaining(self) -> list[str]:
        return [key for key in self.requests if key not in self.finished]

    def run(self, llm: LLM) -> Iterator[tuple[str, Output]]:
        """Answer what remains; each answer is in the file when it is given out."""
        todo = ((key, _prompt(llm, line), params) for key, line, params in self._todo(llm))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("a", encoding="utf-8") as file:
            for key, output in llm.run(todo):
                # One write a line: a reader, or a run that goes on, never sees half of one.
                file.write(json.dumps(answer(key, output), ensure_ascii=False) + "\n")
                file.flush()
                yield key, output

    def _todo(self, llm: LLM) -> Iterator[tuple[str, dict[str, Any], SamplingParams]]:
        for key in self.remaining:
            line, params = self.requests[key]
            yield key, line, llm.chat_params(params) if "messages" in line else params

    def _read(self) -> dict[str, tuple[dict[str, Any], SamplingParams]]:
        try:
            lines = self.source.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--input {self.source} cannot be read: {error}") from error
        found: dict[str, tuple[dict[str, Any], SamplingParams]] = {}
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            where = f"--input {self.source}, line {number}"
            line = _object(text, where)
            key = str(line.get("id", number))
            if key in found:
                raise UserError(f"{where}: id {key!r} was used before: give each line its own")
            found[key] = (line, self._params(line, where))
        if not found:
            raise UserError(f"--input {self.source} holds no request: write one JSON object a line")
        return found

    def _params(self, line: dict[str, Any], where: str) -> SamplingParams:
        given = [name for name in PROMPTS if name in line]
        if len(given) != 1:
            raise UserError(f"{where}: give exactly one of {', '.join(PROMPTS)}")
        wrong = set(line) - _FIELDS - {"id", *PROMPTS}
        if wrong:
            raise UserError(f"{where}: {sorted(wrong)[0]!r} is no parameter of a request")
        try:
            return replace(self.defaults, **{n: line[n] for n in line if n in _FIELDS})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _finished(self) -> set[str]:
        """Ids of the answers that are there; the half line of a killed run is cut off."""
        if not self.target.exists():
            return set()
        data = self.target.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.target, len(whole))
        found = set()
        for number, text in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
            where = f"--output {self.target}, line {number}"
            line = _object(text, where)
            if "id" not in line or "text" not in line:
                raise UserError(f"{where} is no answer of an earlier run: give another file")
            if "error" not in line:
                found.add(str(line["id"]))
        return found


def answer(key: str, output: Output) -> dict[str, Any]:
    """An answer as its line."""
    entry: dict[str, Any] = {
        "id": key,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "generated_tokens": sum(len(c.token_ids) for c in output.outputs),
        "ttft_s": round(output.ttft_s, 6),
    }
    if len(output.outputs) > 1:
        entry["texts"] = [completion.text for completion in output.outputs]
    if output.logprobs is not None:
        entry["logprobs"] = [asdict(p) for p in output.logprobs]
    if output.error is not None:
        entry["error"] = output.error
    return entry


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: write a JSON object, as in {{'prompt': 'Hello'}}")
    return value


def _prompt(llm: LLM, line: dict[str, Any]) -> Prompt:
    if "messages" in line:
        return llm.chat_prompt(line["messages"])
    prompt: Prompt = line["token_ids"] if "token_ids" in line else line["prompt"]
    return prompt
