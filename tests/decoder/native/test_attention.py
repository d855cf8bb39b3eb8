"""Paged attention of mixed batches against float64, from no context to 40 k tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from services.decoder.batch import Batch
from services.decoder.kv_view import ContiguousKv
from services.decoder.ops.base import AttentionShape, AttentionTensors
from services.decoder.ops.native import NativeOps
from tests.decoder.native.steps import Array, make_batch, make_kv, ones, rms_norm, start
from tests.decoder.native.tensors import float_linear, of_bf16, of_int8, to_bf16, to_int8

HIDDEN = 24


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    window: int = 0

    @property
    def shape(self) -> AttentionShape:
        """As the ops take it."""
        inv_freq = (10000.0 ** (-np.arange(self.head_dim // 2) / (self.head_dim // 2))).astype(np.float32)
        return AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim, 1e-6, 1e4, inv_freq, 1.0, self.window)


class Layer:
    """A random attention layer, and what it should answer."""

    def __init__(self, heads: Heads, seed: int = 0, v_size: float = 0.25) -> None:
        rng = np.random.default_rng(seed)
        self.heads = heads
        q_size, kv_size = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        shapes = {"q": (q_size, HIDDEN), "k": (kv_size, HIDDEN), "v": (kv_size, HIDDEN), "o": (HIDDEN, q_size)}
        sizes = {"q": 0.25, "k": 0.25, "v": v_size, "o": 0.25}
        made = {name: float_linear(name, rng.standard_normal(shape) * sizes[name]) for name, shape in shapes.items()}
        self.exact = {name: exact for name, (_, exact) in made.items()}
        linears = [made[name][0] for name in "qkvo"]
        norm = ones(heads.head_dim)
        self.tensors = AttentionTensors(ones(HIDDEN), linears[0], linears[1], linears[2], linears[3], norm, norm)

    def run(self, ops: NativeOps, x: Array, batch: Batch, kv: ContiguousKv) -> Array:
        """One step, committed."""
        step, hidden = start(ops, x, batch, kv)
        handle = ops.load_attention(self.tensors, self.heads.shape)
        q, k, v = ops.norm_qkv_rope(handle, hidden, step)
        out = ops.hidden_rows(ops.out_proj_residual(handle, ops.attention(handle, 0, q, k, v, step), hidden))
        ops.commit(step)
        return out

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """q, k and v of rows at some positions."""
        heads, normed = self.heads, rms_norm(x)
        dim = heads.head_dim
        q = rms_norm((normed @ self.exact["q"].T).reshape(len(x), heads.num_heads, dim))
        k = rms_norm((normed @ self.exact["k"].T).reshape(len(x), heads.num_kv_heads, dim))
        v = (normed @ self.exact["v"].T).reshape(len(x), heads.num_kv_heads, dim)
        angles = positions[:, None, None] * heads.shape.rope_inv_freq.astype(np.float64)
        cos, sin = np.cos(angles), np.sin(angles)

        def turn(rows: Array) -> Array:
            a, b = rows[..., : dim // 2], rows[..., dim // 2 :]
            return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)

        return turn(q), turn(k), v

    def reference(self, x: Array, q: Array, k: Array, v: Array, first: int) -> Array:
        """Rows at positions first, first + 1 ... over keys from position 0."""
        heads = self.heads
        group = heads.num_heads // heads.num_kv_heads
        out = np.empty_like(q)
        for row in range(len(q)):
            stop = first + row + 1
            begin = max(0, stop - heads.window) if heads.window else 0
            for head in range(heads.num_heads):
                scores = k[begin:stop, head // group] @ q[row, head] * heads.shape.scale
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v[begin:stop, head // group] / weights.sum()
        return x + out.reshape(len(x), -1) @ self.exact["o"].T


ROUND = {
    "f32": lambda a: a.astype("f4"),
    "f16": lambda a: a.astype("f2"),
    "bf16": lambda a: of_bf16(to_bf16(a)),
    "int8": lambda a: of_int8(*to_int8(a)),
}


def _store(kv: ContiguousKv, seq: int, value: int, rows: Array) -> None:
    """Puts rows [length, num_kv_heads, head_dim] into a cache."""
    length = len(rows)
    if kv.kv_dtype == "int8":
        codes, scales = to_int8(rows)
        kv.block(seq)[0, value, :, :length] = codes.swapaxes(0, 1)
        kv.scales(seq)[0, value, :, :length] = scales.T
        return
    stored = to_bf16(rows) if kv.kv_dtype == "bf16" else ROUND[kv.kv_dtype](rows)
    kv.block(seq)[0, value, :, :length] = stored.swapaxes(0, 1)


def _check(
    ops: NativeOps, heads: Heads, new_lens: list[int], context_lens: list[int], kv_dtype: str, layout: str = "hnd"
) -> None:
    layer, rng = Layer(heads), np.random.default_rng(sum(new_lens))
    kv = make_kv(
        len(new_lens),
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        kv_dtype=kv_dtype,
        kv_capacity=max(c + n for c, n in zip(context_lens, new_lens, strict=True)),
        layout=layout,
    )
    block_size = kv.shape.block_size
    contexts = []
    for seq, length in enumerate(context_lens):
        past = [rng.standard_normal((length, heads.num_kv_heads, heads.head_dim)) for _ in range(2)]
        for value, rows in enumerate(past):
            _store(kv, seq, value, rows)
        contexts.append([ROUND[kv_dtype](rows).astype(np.float64) for rows in past])
    batch = make_batch(new_lens, context_lens, block_size=block_size)
    x = rng.standard_normal((sum(new_lens), HIDDEN)).astype(np.float32)
    found = layer.run(ops, x, batch, kv)
    q, k, v = layer.project(x, batch.positions)
    for seq, (begin, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        keys, values = (
            np.concatenate((past, ROUND[kv_dtype](own[begin:end]).astype(np.float64)))
            for past, own in zip(contexts[seq], (k, v), strict=True)
        )
        expected = layer.reference(x[begin:end], q[begin:end], keys, values, context_lens[seq])
        # Where float32 and float64 round a key to different neighbours, a bf16 score moves by a few thousandths.
        tolerance = 2e-5 if kv_dtype == "f32" else 2e-2
        assert np.abs(found[begin:end] - expected).max(initial=0) <= tolerance
        assert np.median(np.abs(found[begin:end] - expected)) <= 2e-4


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(),
        Heads(1, 1, 2),
        Heads(6, 2, 24),
        Heads(8, 1, 64),
        Heads(5, 1, 18),
        Heads(2, 2, 256),
        Heads(window=7),
        Heads(window=33),
    ],
    ids=str,
)
def test_mixed_batches(isa: str, heads: Heads, kv_dtype: str) -> None:
    ops = NativeOps("exact", 2, isa)
    for layout in ("hnd", "nhd"):
        _check(ops, heads, [1, 5, 1, 40, 2], [0, 0, 31, 33, 700], kv_dtype, layout)


@pytest.mark.parametrize("seed", range(12))
def test_s13_s20_random_shapes_in_int8_and_both_layouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    window = int(rng.choice([0, 0, 5, 200]))
    heads = Heads(kv_heads * group, kv_heads, 2 * int(rng.integers(1, 80)), window)
    num_seqs = int(rng.integers(1, 5))
    new_lens, contexts = rng.integers(1, 30, num_seqs).tolist(), rng.integers(0, 900, num_seqs).tolist()
    for layout in ("hnd", "nhd"):
        _check(NativeOps("exact", 2), heads, new_lens, contexts, "int8", layout)


@pytest.mark.parametrize("v_size", [0.25, 0.0, 1e-41, 5e37], ids=["usual", "zero", "denormal", "infinite"])
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("heads", [Heads(), Heads(6, 3, 22), Heads(1, 1, 2), Heads(2, 2, 256)], ids=str)
def test_s20_int8_rows_are_the_quotients_by_the_largest_over_127_bit_for_bit(
    isa: str, heads: Heads, layout: str, v_size: float
) -> None:
    layer, rng = Layer(heads, v_size=v_size), np.random.default_rng(4)
    x = rng.standard_normal((37, HIDDEN)).astype(np.float32)
    stored = {}
    for kv_dtype in ("f32", "int8"):
        sizes = {"num_kv_heads": heads.num_kv_heads, "head_dim": heads.head_dim, "kv_capacity": 40}
        stored[kv_dtype] = make_kv(1, **sizes, kv_dtype=kv_dtype, layout=layout)
        layer.run(NativeOps("exact", 2, isa), x, make_batch([37], [0], block_size=40), stored[kv_dtype])
    codes, scales = to_int8(stored["f32"].block(0))
    broken = ~np.isfinite(stored["f32"].block(0)).all(axis=-1)
    assert broken.any() == (v_size == 5e37)
    codes[broken], scales[broken] = 0, np.nan
    assert np.array_equal(stored["int8"].block(0), codes)
    assert np.array_equal(stored["int8"].scales(0), scales, equal_nan=True)


@pytest.mark.parametrize(("new_len", "context_len"), [(1, 40_000), (3, 20_479), (20, 5_000)])
def test_long_contexts(new_len: int, context_len: int) -> None:
    _check(NativeOps("exact", 2), Heads(), [new_len], [context_len], "f32")
    _check(NativeOps("exact", 3), Heads(window=1000), [new_len], [context_len], "f32")
    _check(NativeOps("exact", 2), Heads(), [new_len], [context_len], "int8", "nhd")


@pytest.mark.parametrize(("kv_dtype", "layout"), [("bf16", "hnd"), ("int8", "hnd"), ("int8", "nhd")])
def test_bits_depend_on_neither_chunks_nor_threads_nor_heads_company(kv_dtype: str, layout: str) -> None:
    """With contexts beyond a split, one row or many at a time."""
    layer, rng = Layer(Heads(6, 2, 24)), np.random.default_rng(1)
    x = rng.standard_normal((1100, HIDDEN)).astype(np.float32)

    def run(threads: int, chunks: list[int]) -> Array:
        ops = NativeOps("fast", threads)
        kv = make_kv(1, num_kv_heads=2, head_dim=24, kv_dtype=kv_dtype, kv_capacity=1100, layout=layout)
        done, rows = 0, []
        for size in chunks:
            batch = make_batch([size], [done], block_size=1100)
            rows.append(layer.run(ops, x[done : done + size], batch, kv))
            done += size
        return np.concatenate(rows)

    whole = run(1, [1100])
    assert np.array_equal(run(2, [1100]), whole)
    assert np.array_equal(run(3, [500, 11, 1, 1, 2, 585]), whole)
    assert np.array_equal(run(2, [1] * 1100), whole)


def test_far_positions_turn_as_precisely_as_near_ones() -> None:
    layer = Layer(Heads())
    kv = make_kv(1, num_kv_heads=2, head_dim=16, kv_capacity=1 << 16)
    x = np.random.default_rng(2).standard_normal((1, HIDDEN)).astype(np.float32)
    layer.run(NativeOps("exact", 1), x, make_batch([1], [65_000], block_size=1 << 16), kv)
    _, k, _ = layer.project(x, np.array([65_000]))
    assert np.abs(kv.block(0)[0, 0, :, 65_000] - k[0]).max() < 1e-6
