"""Streamed text: however it is cut, the deltas add up to the tokenizer's own decoding, up to the stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decoder.errors import InvalidRequestError
from services.decoder.text_stream import TextStream
from services.decoder.tokenizer import Tokenizer, load_tokenizer
from tests.decoder.tokenizers_for_tests import VOCAB_SIZE, byte_fallback, byte_level

BYTE_LEVEL = Tokenizer(byte_level(), VOCAB_SIZE, {})
FALLBACK = Tokenizer(byte_fallback(), VOCAB_SIZE, {})

# Few different characters, so that stop strings are hit, nearly hit and overlapped; and characters of two to four bytes.
TEXTS = st.text("abSTO né你😀\N{REPLACEMENT CHARACTER}", max_size=24)
STOPS = st.lists(st.text("abSTO né你😀", min_size=1, max_size=4), max_size=4)
# Any bytes at all, well-formed or not, and special and unknown tokens between them.
JUNK_IDS = st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=24)
IDS = st.one_of(JUNK_IDS, TEXTS.map(lambda text: BYTE_LEVEL.encode(text, "text", add_special_tokens=False)))


def _up_to_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What may be delivered, the slow way: the stop string that ends first counts, of those the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(ids=IDS, stops=STOPS)
def test_deltas_add_up_to_the_full_decoding(ids: list[int], stops: list[str]) -> None:
    stream = TextStream(BYTE_LEVEL, stops)
    deltas = [stream.push(token_id) for token_id in ids]
    deltas.append(stream.finish())
    assert ("".join(deltas), stream.stop_string) == _up_to_stop(BYTE_LEVEL.decode(ids), stops)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, stops=STOPS, cut=st.integers(0, 24), lost=st.integers(0, 3), ahead=st.booleans())
def test_resuming_neither_loses_nor_doubles_a_character(
    ids: list[int], stops: list[str], cut: int, lost: int, ahead: bool
) -> None:
    cut = min(cut, len(ids))
    whole = TextStream(BYTE_LEVEL, stops)
    delivered = "".join(whole.push(token_id) for token_id in ids[:cut])
    expected = delivered + "".join(whole.push(token_id) for token_id in ids[cut:]) + whole.finish()
    # The client may lack the last of the text, or have some that this decoder would hold back.
    delivered = delivered[: len(delivered) - lost] if lost < len(delivered) else delivered
    if ahead and whole.stop_string is None:
        certain = TextStream(BYTE_LEVEL)
        delivered = "".join(certain.push(token_id) for token_id in ids[:cut])

    resumed = TextStream(BYTE_LEVEL, stops)
    received = delivered + resumed.resume(ids[:cut], delivered, "resume")
    received += "".join(resumed.push(token_id) for token_id in ids[cut:]) + resumed.finish()
    assert (received, resumed.stop_string) == (expected, whole.stop_string)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, stops=STOPS, lost=st.integers(0, 3))
def test_a_stream_that_broke_off_after_its_last_token_gets_the_rest_of_its_text(
    ids: list[int], stops: list[str], lost: int
) -> None:
    whole = TextStream(BYTE_LEVEL, stops)
    expected = "".join(whole.push(token_id) for token_id in ids) + whole.finish()
    delivered = expected[: max(0, len(expected) - lost)]
    resumed = TextStream(BYTE_LEVEL, stops)
    received = delivered + resumed.resume(ids, delivered, "resume", is_whole=True) + resumed.finish()
    assert (received, resumed.stop_string) == (expected, whole.stop_string)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS.filter(lambda text: "\N{REPLACEMENT CHARACTER}" not in text and "  " not in text), stops=STOPS)
def test_byte_fallback_tokenizers_stream_exactly_too(text: str, stops: list[str]) -> None:
    ids = FALLBACK.encode(text, "text", add_special_tokens=False)
    stream = TextStream(FALLBACK, stops)
    received = "".join([*(stream.push(token_id) for token_id in ids), stream.finish()])
    assert (received, stream.stop_string) == _up_to_stop(FALLBACK.decode(ids), stops)


@given(ids=JUNK_IDS)
def test_no_delta_has_half_a_character(ids: list[int]) -> None:
    stream = TextStream(BYTE_LEVEL)
    for token_id in ids:
        stream.push(token_id).encode()  # a lone surrogate would raise


def test_half_a_character_waits_and_ends_as_a_replacement_character() -> None:
    first, *rest = BYTE_LEVEL.encode("你", "text", add_special_tokens=False)
    stream = TextStream(BYTE_LEVEL)
    assert stream.push(first) == ""
    assert [stream.push(token_id) for token_id in rest][-1] == "你"
    assert stream.push(first) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_the_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    ids = BYTE_LEVEL.encode("ab STOP", "text", add_special_tokens=False)
    stream = TextStream(BYTE_LEVEL, [" STOPS"])
    assert "".join(stream.push(token_id) for token_id in ids) == "ab"
    assert stream.finish() == " STOP"
    stream = TextStream(BYTE_LEVEL, ["b STO"])
    assert "".join(stream.push(token_id) for token_id in ids) == "a"
    assert stream.stop_string == "b STO"
    assert stream.finish() == ""


def test_a_delivered_text_of_other_tokens_is_refused() -> None:
    ids = BYTE_LEVEL.encode("hello", "text", add_special_tokens=False)
    with pytest.raises(InvalidRequestError, match=r"^resume.x: is not what .* part at character 2; send exactly"):
        TextStream(BYTE_LEVEL).resume(ids, "heLlo", "resume.x")
    with pytest.raises(InvalidRequestError, match="part at character 5"):
        TextStream(BYTE_LEVEL).resume(ids, "hello there", "resume.x")


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    stream = TextStream(load_tokenizer(tmp_path, VOCAB_SIZE), ["stop"])
    assert stream.resume([1, 2], "", "resume") == ""
    assert stream.push(3) + stream.finish() == ""


@given(stop=st.text("ab", min_size=1, max_size=6), text=st.text("ab", max_size=40))
def test_overlapping_stop_strings_are_found_where_str_finds_them(stop: str, text: str) -> None:
    stream = TextStream(BYTE_LEVEL, [stop])
    ids = BYTE_LEVEL.encode(text, "text", add_special_tokens=False)
    received = "".join(stream.push(token_id) for token_id in ids) + stream.finish()
    assert received == text.split(stop, 1)[0]
