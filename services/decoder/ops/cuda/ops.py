"""The `cuda` backend behind `Ops`: the model's calls are recorded, and a step is two kernels, one that computes and one that commits.

The whole forward pass is one persistent kernel, because a launch costs more than a small step's stages do. There are two sets of
kernels, `fast.FastKernels` and `plain.PlainKernels`. Nothing here imports CUDA before a GPU is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from services.decoder.batch import Batch
from services.decoder.errors import CheckpointError, EngineFailedError
from services.decoder.kv_view import KvView
from services.decoder.ops.base import (
    AttentionShape,
    AttentionTensors,
    Handle,
    LinearTensors,
    MlpTensors,
    MoeShape,
    MoeTensors,
    Tensor,
)
from services.decoder.ops.cuda import source, table
from services.decoder.ops.cuda.compiled_steps import CompiledSteps
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.sampler import Sampled, sample_rows

_LEAST_CAPABILITY = (8, 0)  # tensor cores take bf16, and copies to shared memory are asynchronous


class DevicePool(KvView, Protocol):
    """A K/V view whose bytes are in the memory of this process's GPU."""

    device_address: int  # of block 0


class KernelSet(Protocol):
    """One way to compute: turns tensors into its own handles, and a recorded model into kernels and memory."""

    name: str  # of what its activations are rounded to
    kv_dtypes: tuple[str, ...]
    kv_layouts: tuple[str, ...]
    revision: str  # changes whenever the kernels' text does

    def load_embedding(self, table: LinearTensors) -> Handle: ...
    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> Handle: ...
    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Handle: ...
    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> Handle: ...
    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> Handle: ...

    def check(self, program: tuple[Any, ...]) -> None:
        """Raises CheckpointError for a model that its parts did not refuse, but that cannot be run."""
        ...

    def build(self, driver: CudaDriver, program: tuple[Any, ...], capacity: table.Capacity) -> table.Built:
        """Kernels and memory for steps up to `capacity` of one model: embedding, then attention and MLP of each layer, and head."""
        ...


@dataclass(eq=False)
class _Running:
    """What was built, and where its launches are."""

    built: table.Built
    done: mx.array  # the last launch's; an input of the next, so that MLX keeps their order
    launches: int = 0
    in_flight: bool = False


@dataclass(eq=False)
class CudaStep:
    """One step: its batch, the model's calls so far, and what computes it, once it was launched."""

    batch: Batch
    pool: DevicePool
    calls: list[Any] = field(default_factory=list)
    running: _Running | None = None


class CudaOps:
    """See `Ops`. What a set of kernels does not take is refused when it is loaded."""

    backend = "cuda"
    batch_invariant = True

    def __init__(self, kernels: KernelSet, driver: CudaDriver) -> None:
        capability = driver.capability
        if capability < _LEAST_CAPABILITY:
            wanted = ".".join(str(part) for part in _LEAST_CAPABILITY)
            raise CheckpointError(
                f"the cuda backend needs a GPU of compute capability {wanted}; {driver.name} has "
                f"{capability[0]}.{capability[1]}; use --backend mlx"
            )
        self.kernels = kernels
        self._driver = driver
        self._multiprocessors = driver.multiprocessors
        self._steps = CompiledSteps()
        self._running: _Running | None = None
        self._program: tuple[Any, ...] = ()
        self._loaded: dict[str, list[Handle]] = {"embedding": [], "attention": [], "mlp": [], "head": []}

    @property
    def numerics_id(self) -> str:
        """See `Ops`."""
        major, minor = self._driver.capability
        return f"cuda-{self.kernels.name}-sm{major}{minor}-{self.kernels.revision}"

    def load_embedding(self, table: LinearTensors) -> Handle:
        """See `Ops`."""
        return self._kept("embedding", self.kernels.load_embedding(table))

    def load_attention(self, tensors: AttentionTensors, shape: AttentionShape) -> Handle:
        """See `Ops`."""
        return self._kept("attention", self.kernels.load_attention(tensors, shape))

    def load_mlp(self, tensors: MlpTensors, rms_norm_eps: float) -> Handle:
        """See `Ops`."""
        return self._kept("mlp", self.kernels.load_mlp(tensors, rms_norm_eps))

    def load_moe(self, tensors: MoeTensors, shape: MoeShape, rms_norm_eps: float) -> Handle:
        """See `Ops`."""
        return self._kept("mlp", self.kernels.load_moe(tensors, shape, rms_norm_eps))

    def load_head(self, norm: Tensor, head: LinearTensors, rms_norm_eps: float) -> Handle:
        """See `Ops`."""
        return self._kept("head", self.kernels.load_head(norm, head, rms_norm_eps))

    def check_loaded(self) -> None:
        """Raises CheckpointError when the model that was loaded cannot be run; for one model an instance."""
        loaded = self._loaded
        layers = zip(loaded["attention"], loaded["mlp"], strict=True)
        self.kernels.check((loaded["embedding"][0], *(part for layer in layers for part in layer), loaded["head"][0]))

    def begin_step(self, batch: Batch, kv: KvView) -> CudaStep:
        """See `Ops`; the pool must be in GPU memory.

        The GPU starts at once, on the model of the step before: the host records this step's calls meanwhile, and they are compared
        before its result is used.
        """
        if not hasattr(kv, "device_address"):
            raise EngineFailedError(
                "the cuda backend needs a pool in GPU memory; start the manager with --pool-memory cuda"
            )
        self.check_kv_dtype(kv.kv_dtype)
        if kv.shape.layout not in self.kernels.kv_layouts:
            raise EngineFailedError(
                f"--kv-layout: the cuda backend's {self.kernels.name} kernels do not take {kv.shape.layout}; use "
                f"{' or '.join(self.kernels.kv_layouts)}, or --precision exact"
            )
        step = CudaStep(batch, cast(DevicePool, kv))
        if self._program:
            self._launch(self._program, step)
        return step

    def check_kv_dtype(self, kv_dtype: str) -> None:
        """Raises EngineFailedError for K/V that the kernels do not take."""
        if kv_dtype not in self.kernels.kv_dtypes:
            raise EngineFailedError(
                f"--kv-dtype: the cuda backend's {self.kernels.name} kernels take {' or '.join(self.kernels.kv_dtypes)} "
                f"K/V, not {kv_dtype}; choose one of these, --precision exact (which takes bf16, f16 and f32), or --backend mlx"
            )

    def embed(self, embedding: Handle, step: CudaStep) -> CudaStep:
        """Recorded."""
        step.calls.append(embedding)
        return step

    def norm_qkv_rope(self, attention: Handle, hidden: CudaStep, step: CudaStep) -> tuple[CudaStep, CudaStep, CudaStep]:
        """Recorded."""
        step.calls.append(attention)
        return step, step, step

    def attention(self, attention: Handle, layer: int, q: Handle, k: Handle, v: Handle, step: CudaStep) -> CudaStep:
        """Part of the recorded layer."""
        return step

    def out_proj_residual(self, attention: Handle, attended: CudaStep, hidden: Handle) -> CudaStep:
        """Part of the recorded layer."""
        return attended

    def dense_mlp(self, mlp: Handle, hidden: CudaStep) -> CudaStep:
        """Recorded."""
        hidden.calls.append(mlp)
        return hidden

    def moe(self, moe: Handle, hidden: CudaStep) -> CudaStep:
        """Recorded."""
        hidden.calls.append(moe)
        return hidden

    def head_and_sample(self, head: Handle, hidden: CudaStep, step: CudaStep) -> Sampled:
        """See `Ops`: runs the recorded step. Rows with filters, penalties or reports are drawn on the host."""
        running = self._launched(head, step)
        count = len(step.batch.sample_rows)
        if not count:
            return Sampled(np.empty(0, np.int32), [], [])
        self._wait(running)
        token_ids = running.built.buffers.results[1 : 1 + count].copy()
        if (token_ids < 0).any():
            raise EngineFailedError(f"the model's logits are not finite in sample row {int(np.argmin(token_ids))}")
        logprobs: list[float | None] = [None] * count
        top: list[Any] = [()] * count
        others = [index for index, row in enumerate(step.batch.sampling) if not table.on_device(row)]
        if others:
            sampled = sample_rows(
                self._logits(running, count)[others], [step.batch.sampling[index] for index in others]
            )
            for at, index in enumerate(others):
                token_ids[index] = sampled.token_ids[at]
                logprobs[index], top[index] = sampled.logprobs[at], sampled.top[at]
        return Sampled(token_ids, logprobs, top)

    def logits(self, head: Handle, hidden: CudaStep, step: CudaStep) -> npt.NDArray[np.float32]:
        """See `Ops`."""
        running = self._launched(head, step)
        return self._logits(running, len(step.batch.sample_rows))

    def commit(self, step: CudaStep) -> None:
        """See `Ops`; returns when the rows are in the pool, because what follows may give blocks away."""
        running = step.running
        if running is None or running is not self._running:
            raise EngineFailedError("a step was committed before it ran")
        self._submit(running, running.built.commit, ("commit",))
        self._wait(running)

    def scratch(self, name: str) -> npt.NDArray[Any]:
        """A copy of one of the kernels' buffers after the last step, for tests and benchmarks."""
        running = self._running
        if running is None:
            raise EngineFailedError("no step has run")
        mx.eval(running.done)
        # A copy: an array that the host looks into moves, and the kernels know it by its address.
        array = running.built.buffers.arrays[name]
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array * 1)

    def _grid(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, Any]:
        """Every multiprocessor has one block, and one output."""
        threads = source.THREADS_PER_BLOCK
        return {
            "output_shapes": [shape],
            "output_dtypes": [dtype],
            "grid": (self._multiprocessors * threads, 1, 1),
            "threadgroup": (threads, 1, 1),
        }

    def _logits(self, running: _Running, count: int) -> npt.NDArray[np.float32]:
        shape = (count, running.built.vocab_size)
        inputs = [running.built.table, running.done]
        return np.array(running.built.rows(inputs=inputs, **self._grid(shape, mx.float32))[0])

    def _launched(self, head: Handle, step: CudaStep) -> _Running:
        """What computes the step, which is launched now if it was not, or was for another model."""
        program = (*step.calls, head)
        # Weights compare by identity.
        if step.running is not None and program == self._program:
            return step.running
        return self._launch(program, step)

    def _launch(self, program: tuple[Any, ...], step: CudaStep) -> _Running:
        wanted = table.needed(step.batch)
        running = self._prepared(program, wanted)
        buffers, pool = running.built.buffers, step.pool
        address, shape = pool.device_address, pool.shape
        count = table.fill_step(buffers.words, step.batch, wanted.splits, address, shape, pool.kv_dtype)
        if running.in_flight:  # a step that was given up: its successor would overwrite what it reads
            self._wait(running)
        slot = buffers.step_address + running.launches % 2 * buffers.capacity.words * 4
        self._driver.copy_to_device(slot, buffers.words[:count])
        batch = step.batch
        kernel = running.built.small if batch.num_tokens <= source.SMALL_ROWS else running.built.large
        self._submit(running, kernel, (batch.num_tokens, batch.num_seqs, len(batch.sample_rows)))
        running.launches += 1
        step.running = running
        return running

    def _submit(self, running: _Running, kernel: table.Kernel, shape: tuple[Any, ...]) -> None:
        def launch(addresses: mx.array, previous: mx.array) -> mx.array:
            return kernel(inputs=[addresses, previous], **self._grid((1,), mx.int32))[0]

        running.in_flight = True
        running.done = self._steps.submit(shape, launch, running.built.table, running.done)

    def _wait(self, running: _Running) -> None:
        """Until everything that was launched is over: the driver's own wait is shorter than MLX's, and lets other threads run.

        MLX has handed a kernel to the driver when `async_eval` returns; should it ever not have, the last launch's number is missing.
        """
        self._driver.synchronize()
        if (int(running.built.buffers.results[0]) ^ running.launches) & 0xFFFFFFFF:
            mx.eval(running.done)
        running.in_flight = False

    def _prepared(self, program: tuple[Any, ...], wanted: table.Capacity) -> _Running:
        running = self._running
        if running is not None and program == self._program and running.built.buffers.capacity.holds(wanted):
            return running
        if running is not None:
            mx.eval(running.done)  # nothing in flight reads the old buffers
            wanted = running.built.buffers.capacity.joined(wanted)
            self._steps.clear()
            self._running = running = None  # they go before the new ones come
        capacity = table.Capacity(
            _round_up(wanted.rows, 32),
            _round_up(wanted.sample_rows, 32),
            _round_up(wanted.splits, 8),
            _round_up(wanted.words, 4096),
        )
        built = self.kernels.build(self._driver, program, capacity)
        self._running, self._program = _Running(built, mx.zeros((1,), mx.int32)), program
        return self._running

    def _kept(self, kind: str, handle: Handle) -> Handle:
        self._loaded[kind].append(handle)
        return handle


def _round_up(value: int, to: int) -> int:
    return max(to, -(-value // to) * to)
