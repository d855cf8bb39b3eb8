"""Text as it grows from tokens: whole characters only, and nothing that may turn out to be part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from services.decoder.errors import InvalidRequestError
from services.decoder.tokenizer import BytePieces, Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that became certain with one more token."""
        ...

    def finish(self) -> str:
        """The text of what no later token can complete any more."""
        ...


class _ByteDetokenizer:
    """For byte-level tokenizers. Its concatenated text is exactly the tokenizer's own decoding, malformed bytes included."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._holds_bytes = False  # the beginning of a character

    def push(self, token_id: int) -> str:
        if not self._holds_bytes:
            text = self._pieces.whole_text(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._pieces[token_id])
        self._holds_bytes = self._decoder.getstate()[0] != b""
        return text

    def finish(self) -> str:
        self._holds_bytes = False
        return self._decoder.decode(b"", True)


class _ContextDetokenizer:
    """For tokenizers whose tokens depend on their neighbours: decodes from the last certain token on.

    Text that ends in U+FFFD may be half a character, and waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding begins at `_context`, so that a token finds its left neighbour; the text up to `_certain` is out.
        self._context = 0
        self._certain = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._context, self._certain = self._certain, len(self._ids)
        if self._context > 64:  # what lies before is never decoded again
            self._ids, self._certain, self._context = self._ids[self._context :], self._certain - self._context, 0
        return after[len(before) :]

    def finish(self) -> str:
        before, after = self._texts()
        self._context = self._certain = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._context : self._certain])
        return before, self._tokenizer.decode(self._ids[self._context :])


class _NoText:
    """For a checkpoint without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class _StopString:
    """Knuth-Morris-Pratt: how many characters at the end of the text so far are the beginning of one stop string."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback = [0] * len(string)
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length - 1]
            length += string[index] == string[length]
            self._fallback[index] = length

    def push(self, char: str) -> bool:
        """True when this character completes the string."""
        while self.matched and char != self.string[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.string[self.matched]
        return self.matched == len(self.string)


class TextStream:
    """The text of one sample, from its tokens.

    The stop string whose last character comes first ends it (the longest, when several end there), however the text is cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer: _Detokenizer
        if not tokenizer.has_text:
            self._detokenizer = _NoText()
        elif tokenizer.byte_pieces is not None:
            self._detokenizer = _ByteDetokenizer(tokenizer.byte_pieces)
        else:
            self._detokenizer = _ContextDetokenizer(tokenizer)
        # Longest first: of two that end with the same character the longer one counts.
        self._stops = [_StopString(string) for string in sorted(set(stop_strings), key=len, reverse=True)]
        self._passes_all = not self._stops
        self._held = ""  # the beginning of a stop string, perhaps
        self._already_delivered = ""  # what the client has of the text to come
        self.stop_string: str | None = None  # the one that ended the text

    def push(self, token_id: int) -> str:
        """The text to deliver after one more token; empty once a stop string has ended it."""
        if self.stop_string is not None:
            return ""
        text = self._detokenizer.push(token_id)
        return text if self._passes_all and not self._already_delivered else self._deliver(self._release(text))

    def finish(self) -> str:
        """The rest of the text when no token follows: what was held back, and U+FFFD for an unfinished character."""
        if self.stop_string is not None:
            return ""
        text = self._release(self._detokenizer.finish())
        if self.stop_string is None:
            text, self._held = text + self._held, ""
        return self._deliver(text)

    def resume(self, token_ids: Sequence[int], delivered_text: str, field: str, *, is_whole: bool = False) -> str:
        """Takes up a stream that broke off after these tokens, and returns what the client lacks of their text.

        The text to come follows on delivered_text with neither a lost nor a doubled character. is_whole says that no token follows.
        Raises InvalidRequestError naming `field` when delivered_text is not what the tokens decode to.
        """
        certain = "".join(
            self._release(self._detokenizer.push(token_id)) for token_id in token_ids if self.stop_string is None
        )
        if is_whole:  # the client may have the very end of the text already
            certain += self.finish()
        known = certain + self._held
        if not known.startswith(delivered_text):
            same = next((i for i, (a, b) in enumerate(zip(known, delivered_text, strict=False)) if a != b), len(known))
            raise InvalidRequestError(
                field,
                f"is not what output_token_ids decode to: they part at character {same}; send exactly the text that was received",
            )
        self._already_delivered = delivered_text
        return self._deliver(certain)

    def _release(self, text: str) -> str:
        """The part of the held and the new text that is certainly not in a stop string."""
        if self._passes_all:
            return text
        pending = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            for stop in self._stops:
                if stop.push(char) and self.stop_string is None:
                    self.stop_string = stop.string
            if self.stop_string is not None:
                self._held = ""
                return pending[: index - len(self.stop_string)]
        held = max(stop.matched for stop in self._stops)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def _deliver(self, text: str) -> str:
        if not self._already_delivered:
            return text
        known = min(len(self._already_delivered), len(text))
        self._already_delivered = self._already_delivered[known:]
        return text[known:]
