"""The words of a step lie where the kernels' enum says."""

from __future__ import annotations

import re

import numpy as np

from protos.pool_format import BlockShape
from services.decoder.ops.cuda import source, table
from services.decoder.request import SamplingParams
from tests.decoder.cuda.runner import Stream, batch_of


def _names() -> dict[str, int]:
    """The step's header in common.cuh: the index of each word."""
    text = source.kernel_text(("common",))
    found = re.search(r"enum \{(.*?)HEADER_WORDS", text, re.DOTALL)
    assert found is not None
    return {name: index for index, name in enumerate(re.findall(r"[A-Z_]+", found.group(1)))}


def test_a_mixed_step_is_found_where_the_kernels_look() -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    streams = [(Stream(list(range(40, 60)), [7, 2], 17), 3), (Stream([5] * 9, [4], 8, params), 1)]
    batch, shape, at = batch_of(streams, 16), BlockShape.of("f16", "nhd", 2, 3, 16, 64), _names()
    words = np.zeros(4096, np.int32)
    wanted = table.needed(batch)
    pool = 0x7F12_8000_0000
    count = table.fill_step(words, batch, wanted.splits, pool, shape, "f16")
    assert count <= wanted.words

    def array(name: str, size: int) -> list[int]:
        found: list[int] = words[words[at[name]] :][:size].tolist()
        return found

    assert [
        int(words[at[name]]) for name in ("ROWS", "SAMPLE_ROWS", "WORDS", "TABLE_WIDTH", "BLOCK_SIZE", "MAX_SPLITS")
    ] == [*(4, 2, count, 2, 16, 1)]
    halves = words[[at["POOL_LO"], at["POOL_HI"], at["STRIDE_LO"], at["STRIDE_HI"]]].view(np.uint32).astype(np.uint64)
    assert int(halves[0] | halves[1] << 32) == pool
    assert int(halves[2] | halves[3] << 32) == shape.stride_bytes
    assert array("AT_TOKENS", 4) == [57, 58, 59, 5]
    assert array("AT_POSITIONS", 4) == [17, 18, 19, 8]
    assert array("AT_SEQS", 4) == [0, 0, 0, 1]
    assert array("AT_STARTS", 4) == [0, 0, 0, 3]
    assert array("AT_CONTEXTS", 4) == [17, 17, 17, 8]
    assert array("AT_SLOTS", 8) == [2, 1, 2, 2, 2, 3, 4, 8]
    assert array("AT_SAMPLE_ROWS", 2) == [2, 3]
    assert np.array(array("AT_TEMPERATURES", 2), np.int32).view(np.float32).tolist() == [0.0, 0.5]
    assert array("AT_TABLES", 4) == [7, 2, 4, 0]
    strides = shape.row_strides
    names = ("KV_KIND", "LAYER_ROWS", "VALUE_ROWS", "HEAD_ROWS", "TOKEN_ROWS")
    assert [int(words[at[name]]) for name in names] == [17, strides.layer, strides.value, strides.head, strides.token]


def test_steps_that_only_decode_have_the_same_words_as_mixed_ones() -> None:
    """The short way for them leaves what the general one would."""
    streams = [(Stream([5] * n, [0, 1], n - 1), 1) for n in (3, 17, 9)]
    batch, shape = batch_of(streams, 16), BlockShape(1, 1, 16, 64, 2)
    words = np.zeros(4096, np.int32)
    table.fill_step(words, batch, 1, 0, shape, "bf16")
    at = _names()
    for name, wanted in (("AT_SEQS", [0, 1, 2]), ("AT_STARTS", [0, 1, 2]), ("AT_CONTEXTS", [2, 16, 8])):
        assert words[words[at[name]] :][:3].tolist() == wanted
