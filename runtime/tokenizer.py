"""The artifact's tokenizer, read with the `tokenizers` library alone.

`tokenizer.json` holds nearly everything, also whether a prompt begins with the BOS token (as in
transformers 5, its post-processor counts and not `add_bos_token` in the configuration);
`tokenizer_config.json` adds which tokens are special, and the chat template. Results equal those of
transformers' AutoTokenizer for the same folder (tested on the real vocabularies).
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SmeltError, UserError

if TYPE_CHECKING:
    from .chat_template import ChatTemplate

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """Text to token ids and back; also the chat template, `None` where the model has none.

    folder: has tokenizer.json, and tokenizer_config.json and chat_template.jinja if the model does.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: the folder needs a tokenizer.json")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for anything in the file
            raise UserError(f"{path} is not a tokenizer this version reads: {error}") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self.config = _read_json(self.folder / "tokenizer_config.json")
        self.special_tokens = self._special_tokens()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self._byte_ids = self._find_bytes()
        self._template: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Every token's text, as the vocabulary writes it, and its id."""
        tokens: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return tokens

    @property
    def bos_token_id(self) -> int | None:
        return self._token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._token_id("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; add_special_tokens: with BOS and the like where the model has it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids without special tokens, and behind which character of `text` each one ends."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        return encoded.ids, list(accumulate((end for _, end in encoded.offsets), max))

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        """The id of exactly this token, None if there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def to_json(self) -> str:
        """The whole tokenizer as text, with the special tokens that its configuration adds."""
        text: str = self._backend.to_str()
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def is_byte(self, token_id: int) -> bool:
        return token_id in self._byte_ids

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, compiled when first asked for."""
        if self._template is None and (source := self._template_source()) is not None:
            from .chat_template import ChatTemplate

            self._template = ChatTemplate(source, self.special_tokens)
        return self._template

    def _template_source(self) -> str | None:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = self.config.get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found}
        if isinstance(found, dict):
            if "default" not in found and found:
                names = ", ".join(map(str, found))
                raise UserError(f"{self.folder}: chat templates {names}, but none named default")
            found = found.get("default")
        return found if isinstance(found, str) and found else None

    def _special_tokens(self) -> dict[str, str]:
        """The named special tokens, by name; those in the vocabulary are marked as special."""
        from tokenizers import AddedToken

        named = {name: text for name in _NAMED if (text := _text(self.config.get(name)))}
        further: list[str | None] = []
        for name in ("additional_special_tokens", "extra_special_tokens"):
            entries = self.config.get(name) or ()
            values = entries.values() if isinstance(entries, dict) else entries
            further += [_text(entry) for entry in values]
        known = {t.content for t in self._backend.get_added_tokens_decoder().values() if t.special}
        for text in dict.fromkeys([*named.values(), *further]):
            # One outside the vocabulary would get an id that the model has no row for.
            if text and text not in known and self._backend.token_to_id(text) is not None:
                self._backend.add_special_tokens([AddedToken(text, special=True)])
        return named

    def _token_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def _find_bytes(self) -> set[int]:
        """Ids of the byte tokens <0x00> to <0xFF>, where the decoder joins them."""
        decoder = self._backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return set()
        ids = (self.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return {i for i in ids if i is not None}


def _text(token: Any) -> str | None:
    """A token of the configuration is its text, or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as error:
        raise SmeltError(f"{path} is not JSON ({error}): restore or re-create the file") from error
    if not isinstance(data, dict):
        raise SmeltError(f"{path} holds no JSON object: restore or re-create the file")
    return data
