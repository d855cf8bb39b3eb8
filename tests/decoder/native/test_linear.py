"""Linear layers of every format against float64, and the same bits for any company, thread count and instruction set."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from services.decoder.ops.base import LinearTensors
from services.decoder.ops.native import NativeOps
from tests.decoder.native.conftest import ISAS
from tests.decoder.native.steps import Array, make_batch, ones, rms_norm, start
from tests.decoder.native.tensors import ArrayTensor, float_linear, quantise_activations, quantised_linear


def _project(ops: NativeOps, x: Array, linear: LinearTensors, sample_rows: list[int] | None = None) -> Array:
    """The head is a norm and a linear layer."""
    batch = make_batch([len(x)], sample_rows=sample_rows)
    step, hidden = start(ops, x, batch)
    return ops.logits(ops.load_head(ones(x.shape[1]), linear, 1e-6), hidden, step)


def _close(found: Array, expected: Array, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance * max(1, np.abs(expected).max(initial=0))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 1, 1), (3, 5, 7), (2, 33, 520), (35, 18, 1031), (1, 130, 64)])
def test_floats(isa: str, dtype: str, tokens: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(tokens * rows)
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    linear, weight = float_linear("head", rng.standard_normal((rows, cols)) / np.sqrt(cols), dtype)
    for precision in ("exact", "fast"):  # nothing is quantised where weights are not
        _close(_project(NativeOps(precision, 2, isa), x, linear), rms_norm(x) @ weight.T)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("extreme", [False, True])
def test_quantised(isa: str, bits: int, group_size: int, scale_dtype: str, extreme: bool) -> None:
    rng = np.random.default_rng(bits * group_size)
    for tokens, rows, groups in [(1, 1, 1), (2, 7, 3), (3, 6, 13), (9, 130, 8), (34, 5, 17)]:
        cols = groups * group_size
        x = (rng.choice([-1.0, 1.0], (tokens, cols)) if extreme else rng.standard_normal((tokens, cols))).astype("f4")
        shape = (rows, cols)
        linear, weight = quantised_linear("head", shape, bits, group_size, rng, scale_dtype, extreme)
        normed = rms_norm(x)
        _close(_project(NativeOps("exact", 2, isa), x, linear), normed @ weight.T)
        quantised = quantise_activations(normed.astype(np.float32))
        found = _project(NativeOps("fast", 2, isa), x, linear)
        # An activation whose last bit differs from the reference's may be rounded to the next byte; it happens to few rows.
        _close(found, quantised @ weight.T, 2e-5 if extreme else 5e-3)
        assert np.median(np.abs(found - quantised @ weight.T)) < 1e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_rows_bits_depend_on_that_row_alone(precision: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for group_size in (32, 64, 128) if bits else (1,):
        cols = 384
        if bits:
            linear, _ = quantised_linear("head", (77, cols), bits, group_size, rng)
        else:
            linear, _ = float_linear("head", rng.standard_normal((77, cols)))
        x = rng.standard_normal((41, cols)).astype(np.float32)
        whole = _project(NativeOps(precision, 1), x, linear)
        for threads in (2, 3, 5):
            assert np.array_equal(_project(NativeOps(precision, threads), x, linear), whole)
        ops = NativeOps(precision, 2)
        for size in (1, 2, 3, 4, 5, 8, 33):
            begin = int(rng.integers(0, 41 - size))
            assert np.array_equal(_project(ops, x[begin : begin + size], linear), whole[begin : begin + size])


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.skipif(len(ISAS) < 3, reason="this processor runs one set of vector kernels")
def test_vector_instruction_sets_agree_bit_for_bit(precision: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 320)).astype(np.float32)
    for bits in (4, 8):
        linear, _ = quantised_linear("head", (50, 320), bits, 64, rng)
        results = [_project(NativeOps(precision, 2, isa), x, linear) for isa in ISAS if isa != "plain"]
        assert all(np.array_equal(result, results[0]) for result in results)


def test_plain_c_agrees_but_for_fused_products(isa: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, 320)).astype(np.float32)
    linear, _ = quantised_linear("head", (50, 320), 4, 64, rng)
    expected = _project(NativeOps("fast", 2, "plain"), x, linear)
    _close(_project(NativeOps("fast", 2, isa), x, linear), expected.astype(np.float64), 2e-6)


def test_nothing_behind_a_matrix_is_read() -> None:
    """The rows end where memory may be read, which a reader beyond the end would not survive."""
    rng = np.random.default_rng(3)
    four_bits = [
        (4, 32, 32),
        (4, 32, 96),
        (4, 32, 224),
        (4, 32, 352),
        (4, 64, 64),
        (4, 64, 448),
        (4, 128, 128),
        (4, 128, 640),
    ]
    for bits, group_size, cols in [*four_bits, (8, 32, 96)]:
        linear, weight = quantised_linear("head", (3, cols), bits, group_size, rng)
        assert linear.scales is not None
        assert linear.biases is not None
        at_the_end = []
        for part in (linear.weight, linear.scales, linear.biases):
            array = part.numpy()
            pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
            view = np.frombuffer(pages, array.dtype, array.size, mmap.PAGESIZE - array.nbytes).reshape(array.shape)
            # What is mapped behind it by chance could be read: the second page cannot.
            behind = ctypes.c_void_p(view.ctypes.data + array.nbytes)
            assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            view[...] = array
            at_the_end.append(ArrayTensor(part.name, part.dtype, view))
        moved = LinearTensors(at_the_end[0], at_the_end[1], at_the_end[2], bits, group_size)
        for tokens in (2, 5):
            x = rng.standard_normal((tokens, cols)).astype(np.float32)
            _close(_project(NativeOps("exact", 1), x, moved), rms_norm(x) @ weight.T)
            bytes_of_x = quantise_activations(rms_norm(x).astype("f4"))
            _close(_project(NativeOps("fast", 1), x, moved), bytes_of_x @ weight.T, 2e-4)


def test_no_rows() -> None:
    linear, _ = float_linear("head", np.ones((5, 8)))
    x = np.ones((2, 8), np.float32)
    assert _project(NativeOps("fast", 2), x, linear, sample_rows=[]).shape == (0, 5)
    assert _project(NativeOps("fast", 2), x[:0], linear, sample_rows=[]).shape == (0, 5)


def test_zero_and_tiny_activations_are_finite() -> None:
    rng = np.random.default_rng(4)
    linear, _ = quantised_linear("head", (9, 128), 4, 64, rng)
    x = np.zeros((3, 128), np.float32)
    x[1] = 1e-38
    x[2, 0] = 1e30
    assert np.isfinite(_project(NativeOps("fast", 1), x, linear)).all()
