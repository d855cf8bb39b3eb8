"""Text to token ids and back, from the checkpoint's own tokenizer.json; a checkpoint without one serves token ids only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import tokenizers

from services.decoder.errors import CheckpointError, InvalidRequestError, NotServedError

_log = structlog.get_logger(__name__)

# Sources of special tokens, in rising order of authority.
_SPECIAL_TOKEN_FILES = ("special_tokens_map.json", "tokenizer_config.json")


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads."""

    def __init__(self, inner: tokenizers.Tokenizer | None, vocab_size: int, special_tokens: dict[str, str]) -> None:
        self._inner = inner
        self._vocab_size = vocab_size
        self.special_tokens = special_tokens  # "bos_token" and so on, to the token's text
        # Tokens as bytes, for a byte-level tokenizer; None when a token's text depends on its neighbours.
        self.byte_pieces = BytePieces(inner) if inner is not None and _is_byte_level(inner) else None

    @property
    def has_text(self) -> bool:
        """False: the checkpoint has no tokenizer, text is refused and token ids decode to nothing."""
        return self._inner is not None

    def encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; `field` is its path in the request, for errors.

        add_special_tokens adds what the checkpoint puts around a text (such as a BOS token), unless the text begins with it.
        """
        if self._inner is None:
            raise NotServedError(field, "this model's checkpoint has no tokenizer.json; send token_ids instead of text")
        bos = self.special_tokens.get("bos_token")
        add = add_special_tokens and not (bos and text.startswith(bos))
        ids: list[int] = self._inner.encode(text, add_special_tokens=add).ids
        for token_id in ids:
            if token_id >= self._vocab_size:
                token = self._inner.id_to_token(token_id)
                raise InvalidRequestError(
                    field,
                    f"holds {token!r}, which the tokenizer gives id {token_id}, but the model's vocab_size is "
                    f"{self._vocab_size}; leave it out",
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens, and ids that the tokenizer lacks, decode to nothing."""
        if self._inner is None:
            return ""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text


class BytePieces:
    """The bytes of each token of a byte-level tokenizer; the text of a sequence is their concatenation as UTF-8."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._special = frozenset(
            token_id for token_id, added in inner.get_added_tokens_decoder().items() if added.special
        )
        self._known: dict[int, bytes] = {}
        self._whole_texts: dict[int, str | None] = {}

    def whole_text(self, token_id: int) -> str | None:
        """A token's text when its bytes are whole characters, whatever stands around them; None when they are not."""
        if token_id not in self._whole_texts:
            try:
                self._whole_texts[token_id] = self[token_id].decode()
            except UnicodeDecodeError:
                self._whole_texts[token_id] = None
        return self._whole_texts[token_id]

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for special tokens and for ids that the tokenizer lacks."""
        piece = self._known.get(token_id)
        if piece is None:
            token = None if token_id in self._special else self._inner.id_to_token(token_id)
            piece = self._known[token_id] = b"" if token is None else _bytes_of(token)
        return piece


def load_tokenizer(model_dir: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder; raises CheckpointError when its tokenizer.json cannot be read."""
    path = model_dir / "tokenizer.json"
    special_tokens = _special_tokens(model_dir)
    if not path.is_file():
        _log.warning("no tokenizer.json: text prompts are refused and no text is streamed", model=str(model_dir))
        return Tokenizer(None, vocab_size, special_tokens)
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path}: not a tokenizer ({error}); fetch the file again from the model's source"
        ) from error
    # Prompts are neither cut nor padded, whatever the file was saved with.
    inner.no_truncation()
    inner.no_padding()
    if inner.get_vocab_size() > vocab_size:
        _log.warning(
            "the tokenizer has more tokens than the model; a text that uses one of those is refused",
            tokenizer_tokens=inner.get_vocab_size(),
            vocab_size=vocab_size,
        )
    return Tokenizer(inner, vocab_size, special_tokens)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint file, empty when there is no file; raises CheckpointError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); fetch the file again from the model's source"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a JSON object; fetch the file again")
    return value


def _special_tokens(model_dir: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file_name in _SPECIAL_TOKEN_FILES:
        for name, value in read_json_object(model_dir / file_name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    decoder = json.loads(inner.to_str()).get("decoder") or {}
    stages = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return [stage.get("type") for stage in stages] == ["ByteLevel"]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in printable)
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token that is not written in the alphabet stands for its own text
        return token.encode()
