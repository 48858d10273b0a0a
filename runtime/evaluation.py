"""Perplexity of a text, and how far one model's predictions are from another's.

The protocol is fixed, because perplexities of different protocols do not compare:

- The whole text is tokenised once, without special tokens; `max_tokens` keeps its beginning.
- Windows of at most `ctx` tokens start every `stride` tokens. Where the tokenizer begins texts with
  a BOS token, every window begins with it, and it takes one of the `ctx` places.
- A window scores the tokens that no earlier window has scored. Without BOS the very first token of
  the text (and of each window, where windows do not overlap) has nothing before it and is not
  scored. The last window ends with the text.
- Perplexity is exp of the mean negative log likelihood of the scored tokens, computed in float32
  from the model's logits and summed in float64.
- Bits per byte divides the same sum, in bits, by the UTF-8 bytes of the text that was scored, so it
  compares models of different vocabularies.
- KL(original || artifact) in nats and top-1 agreement are means over the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .tokenizer import Tokenizer

DEFAULT_CONTEXT = 512
# Logits of a group of windows are held at once; beyond this many bytes a group ends.
GROUP_BYTES = 128 << 20
ROWS = 256

# Token ids of windows -> their logits, [len, V] each.
Score = Callable[[list[list[int]]], list[torch.Tensor]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Window:
    """Tokens the model sees, and from which of them on they are scored."""

    tokens: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Text:
    """A tokenised text cut into windows. scored_bytes: UTF-8 bytes behind the scored tokens."""

    windows: tuple[Window, ...]
    scored_bytes: int
    protocol: str

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(window.scored for window in self.windows)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. kl in nats; the last three are None without an original."""

    tokens: int
    perplexity: float
    bits_per_byte: float
    protocol: str
    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_original: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises UserError where it is missing, no file, or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: name a UTF-8 text with --text") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): "
            "convert it, or name a text"
        ) from error


def prepare(
    text: str,
    tokenizer: Tokenizer,
    *,
    context: int,
    ctx: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Text:
    """Tokenise `text` and cut it into windows, as the module says.

    context: the model's, in tokens. ctx: of a window, `DEFAULT_CONTEXT` or less by default;
    stride: half of it by default. Raises UserError for sizes that do not fit and a short text.
    """
    ctx = min(context, DEFAULT_CONTEXT) if ctx is None else ctx
    begin = leading_bos(tokenizer)
    if not 2 <= ctx <= context:
        raise UserError(f"--ctx is {ctx}: give 2 or more, at most the model's context of {context}")
    room = ctx - len(begin)
    stride = max(1, room // 2) if stride is None else stride
    if not 1 <= stride <= room:
        raise UserError(f"--stride is {stride}: give 1 or more, at most {room} (a window's tokens)")
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"--max-tokens is {max_tokens}: give 2 or more")
    tokens, ends = tokenizer.encode_with_ends(text)
    tokens, ends = tokens[:max_tokens], ends[:max_tokens]
    windows: list[Window] = []
    done = scored_bytes = 0
    for start in range(0, len(tokens), stride):
        end = min(start + room, len(tokens))
        score_from = done if begin or done > start else start + 1
        if score_from < end:
            seen = (*begin, *tokens[start:end])
            windows.append(Window(seen, len(begin) + score_from - start))
            from_char = ends[score_from - 1] if score_from else 0
            scored_bytes += len(text[from_char : ends[end - 1]].encode())
        done = end
        if end == len(tokens):
            break
    if sum(w.scored for w in windows) < 2:
        raise UserError(f"the text has {len(tokens)} tokens, too few to score: give a longer one")
    protocol = (
        f"windows of {ctx} tokens every {stride}, "
        f"{'each begun with BOS' if begin else 'no BOS'}, each token scored once"
    )
    return Text(tuple(windows), scored_bytes, protocol)


def leading_bos(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The BOS token if this tokenizer puts one before a text."""
    ids = tokenizer.encode("a")
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and ids[:1] == [bos] else ()


def evaluate(
    text: Text, score: Score, original: Score | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score the windows with one model, and compare it with another where one is given.

    progress(done, total) is called in windows. Both models see the same windows.
    """
    sums = _Sums()
    done = 0
    size = _group_size(text, score)
    for at in range(0, len(text.windows), size):
        group = text.windows[at : at + size]
        tokens = [list(window.tokens) for window in group]
        mine = score(tokens)
        theirs = original(tokens) if original is not None else [None] * len(group)
        for window, logits, other in zip(group, mine, theirs, strict=True):
            sums.add(window, logits, other)
        done += len(group)
        if progress is not None:
            progress(done, len(text.windows))
    return sums.result(text, original is not None)


def _group_size(text: Text, score: Score) -> int:
    """Windows whose logits fit into `GROUP_BYTES`; the vocabulary is asked with one token."""
    vocab = score([list(text.windows[0].tokens[:1])])[0].shape[-1]
    longest = max(len(window.tokens) for window in text.windows)
    return max(1, GROUP_BYTES // (longest * vocab * 4))


class _Sums:
    """Running sums over the scored positions, in float64."""

    def __init__(self) -> None:
        self.nll = self.nll_original = self.kl = 0.0
        self.agree = 0

    def add(self, window: Window, logits: torch.Tensor, other: torch.Tensor | None) -> None:
        wanted = torch.tensor(window.tokens)
        for start in range(window.first, len(window.tokens), ROWS):
            end = min(start + ROWS, len(window.tokens))
            log_q = _log_probabilities(logits[start - 1 : end - 1], window)
            self.nll -= _picked(log_q, wanted[start:end])
            if other is None:
                continue
            log_p = _log_probabilities(other[start - 1 : end - 1], window)
            self.nll_original -= _picked(log_p, wanted[start:end])
            # Where p is 0, p log p is 0 and not NaN.
            terms = log_p.exp() * (log_p - log_q)
            self.kl += terms.nan_to_num(nan=0.0, posinf=math.inf).sum(dtype=torch.float64).item()
            self.agree += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())

    def result(self, text: Text, compared: bool) -> Evaluation:
        count = text.tokens
        return Evaluation(
            tokens=count,
            perplexity=_exp(self.nll / count),
            bits_per_byte=self.nll / math.log(2) / max(1, text.scored_bytes),
            protocol=text.protocol,
            kl=max(0.0, self.kl / count) if compared else None,
            top1_agreement=self.agree / count if compared else None,
            perplexity_original=_exp(self.nll_original / count) if compared else None,
        )


def _log_probabilities(logits: torch.Tensor, window: Window) -> torch.Tensor:
    if torch.isnan(logits).any():
        raise UserError(
            f"the logits of a window of {len(window.tokens)} tokens hold NaN: compile the model "
            "again with --check-numerics, or with another --dtype"
        )
    return logits.float().log_softmax(-1)


def _picked(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    picked = log_probabilities.gather(-1, tokens.to(log_probabilities.device)[:, None])
    return float(picked.sum(dtype=torch.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
