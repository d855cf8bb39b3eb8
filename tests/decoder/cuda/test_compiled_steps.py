"""Compiled launches: warm-up, failure, and what growth does to them (S2)."""

from __future__ import annotations

import weakref
from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import BlockShape
from services.decoder.gpu_pool import GpuPool
from services.decoder.ops.cuda import table
from services.decoder.ops.cuda.compiled_steps import CompiledSteps
from services.decoder.ops.cuda.ops import CudaOps
from tests.decoder.cuda.runner import Stream, batch_of

A, B = mx.array([1]), mx.array([2])


class _Counted:
    """A launch that counts how often Python runs it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, table: mx.array, previous: mx.array) -> mx.array:
        self.calls += 1
        return table + previous


def test_s02_a_shape_is_compiled_once_it_was_seen_a_few_times() -> None:
    steps, launch = CompiledSteps(), _Counted()
    results = [int(steps.submit((1, 1, 1), launch, A, mx.array([i])).item()) for i in range(10)]
    assert results == list(range(1, 11))
    assert (launch.calls, len(steps)) == (4, 1)  # three times as it is, and once more to be compiled
    assert int(steps.submit((2, 2, 2), launch, A, B).item()) == 3
    assert (launch.calls, len(steps)) == (5, 1)  # another shape has sightings of its own


def test_s02_a_failure_latches_to_launching_uncompiled_until_it_is_cleared() -> None:
    attempts = []

    def refuse(launch: Any) -> Any:
        attempts.append(launch)
        raise RuntimeError("no compiler")

    steps, launch = CompiledSteps(refuse), _Counted()
    for shape in (1, 2):
        assert [int(steps.submit(shape, launch, A, B).item()) for _ in range(6)] == [3] * 6
    assert (len(attempts), launch.calls, len(steps)) == (1, 12, 0)
    steps.clear()
    assert [int(steps.submit(1, launch, A, B).item()) for _ in range(4)] == [3] * 4
    assert len(attempts) == 2


class _Driver:
    """Stands in for the driver where there is no GPU."""

    capability, multiprocessors, name = (9, 0), 2, "none"

    def copy_to_device(self, address: int, words: Any) -> None:
        """Nothing reads it."""

    def synchronize(self) -> None:
        """Nothing is in flight."""


class _Kernels:
    """Kernels that only count launches; `build` looks at what is left of the one before."""

    name, kv_dtypes, kv_layouts, revision = "none", ("bf16",), ("hnd",), "0"

    def __init__(self) -> None:
        self.ops: CudaOps | None = None
        self.built: list[weakref.ref[table.Built]] = []
        self.at_build: list[tuple[int, bool]] = []  # compiled steps, and whether older buffers are alive

    def build(self, driver: Any, program: tuple[Any, ...], capacity: table.Capacity) -> table.Built:
        assert self.ops is not None
        self.at_build.append((len(self.ops._steps), any(one() is not None for one in self.built)))
        results = np.zeros(1 + capacity.sample_rows, np.int32)
        buffers = table.Buffers(capacity, np.zeros(capacity.words, np.int32), 0, results, 0)

        def kernel(inputs: list[mx.array], **_: Any) -> list[mx.array]:
            return [inputs[0] + inputs[1]]

        built = table.Built(8, kernel, kernel, kernel, kernel, buffers, mx.array([1], mx.int32), [])
        self.built.append(weakref.ref(built))
        return built


def test_s02_growth_empties_the_compiled_steps_before_the_old_buffers_go() -> None:
    kernels: Any = _Kernels()
    driver: Any = _Driver()
    kernels.ops = ops = CudaOps(kernels, driver)
    pool = GpuPool(0, 64, BlockShape(1, 1, 16, 64, 2), "bf16")

    def run(rows: int) -> None:
        streams = [(Stream([1, 2], [0, 1], 1), 1) for _ in range(rows)]
        step = ops.begin_step(batch_of(streams, 16), pool)
        hidden = ops.embed("embedding", step)
        ops.norm_qkv_rope("attention", hidden, step)
        ops.moe("mlp", hidden)
        ops.head_and_sample("head", hidden, step)
        ops.commit(step)

    for _ in range(6):
        run(4)
    assert len(ops._steps) == 2  # the step's and the commit's
    run(40)
    assert kernels.at_build == [(0, False), (0, False)]
    assert len(kernels.built) == 2
