"""Each stage of a step against its float64 twin, from what the stage before left in the kernels' buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from protos.pool_format import BlockShape
from services.decoder.gpu_pool import GpuPool
from services.decoder.ops.base import MlpTensors
from services.decoder.ops.cuda.driver import CudaDriver
from services.decoder.ops.cuda.fast import FastKernels
from services.decoder.ops.cuda.ops import CudaOps, KernelSet
from services.decoder.ops.cuda.plain import PlainKernels
from services.decoder.ops.cuda.table import addresses
from services.decoder.request import SamplingParams
from services.decoder.sampler import sample_rows
from tests.decoder.cuda import twins
from tests.decoder.cuda.random_models import LayerSizes, RandomLayer, to_bf16
from tests.decoder.cuda.runner import Stream, batch_of

Array = np.ndarray[Any, Any]
# Streams of a step: (tokens in the pool, tokens of the step). Odd sizes, both kinds of step, contexts that end beside every edge.
SHORT = [[(0, 1)], [(5, 1), (0, 3)], [(31, 1), (32, 1), (33, 1), (255, 1), (256, 1), (257, 1), (1000, 1)]]
SHORT += [[(i * 7, 1) for i in range(32)], [(0, 33)], [(100, 17), (0, 50), (299, 1), (64, 5)], [(513, 130), (7, 1)]]
LONG = [[(40_000, 1), (0, 1), (12_345, 1)], [(39_990, 20), (3, 30)]]
SMALL = [[(3, 1), (0, 4)], [(20, 40)]]  # for a memory checker, which is slow

FAST = [
    LayerSizes(),
    LayerSizes(
        hidden=320,
        heads=8,
        kv_heads=1,
        head_dim=128,
        experts=33,
        per_token=8,
        width=192,
        bits=8,
        dtype="f32",
        norm_topk=False,
    ),
    LayerSizes(hidden=128, heads=3, kv_heads=3, head_dim=128, experts=128, per_token=3, width=128, bits=0, window=300),
    LayerSizes(
        hidden=256, heads=8, kv_heads=2, experts=64, per_token=1, width=256, group_size=128, router_bits=4, vocab=1001
    ),
]
PLAIN = [
    LayerSizes(dtype="f32"),
    LayerSizes(
        hidden=96,
        heads=5,
        kv_heads=1,
        head_dim=32,
        experts=33,
        per_token=8,
        width=32,
        group_size=32,
        bits=8,
        dtype="f16",
    ),
    LayerSizes(
        hidden=72, heads=6, kv_heads=3, head_dim=24, experts=7, per_token=7, width=40, bits=0, dtype="f32", window=300
    ),
    LayerSizes(hidden=200, heads=4, kv_heads=2, head_dim=128, experts=0, width=136, bits=0, dtype="f16", bias=True),
    LayerSizes(
        hidden=128, heads=2, kv_heads=2, head_dim=256, experts=0, width=384, group_size=128, bias=True, norm_topk=False
    ),
    LayerSizes(hidden=64, heads=10, kv_heads=2, head_dim=40, experts=300, per_token=11, width=8, bits=0, dtype="bf16"),
]


def run(*, small: bool = False) -> Iterator[tuple[str, bool]]:
    """All geometries of both sets of kernels; `small` has little work, for a memory checker."""
    rng = np.random.default_rng(0)
    sets: list[tuple[KernelSet, list[LayerSizes], tuple[str, ...]]] = [
        (FastKernels(), FAST, ("bf16",)),
        (PlainKernels(), PLAIN, ("f32", "bf16", "f16")),
    ]
    for kernels, geometries, kv_dtypes in sets:
        for index, sizes in enumerate(geometries[: 2 if small else None]):
            kv_dtype = kv_dtypes[index % len(kv_dtypes)]
            check = StageCheck(kernels, sizes, kv_dtype, "nhd" if index % 2 else "hnd", rng)
            batches = SMALL if small else SHORT + (LONG if index in (0, 2) else [])
            worst: dict[str, float] = {}
            for streams in batches:
                for name, error in check.errors(streams).items():
                    worst[name] = max(error, worst.get(name, 0.0))
            told = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
            holds = all(error <= check.tolerance(name) for name, error in worst.items())
            yield f"{kernels.name} kernels against float64, K/V {kv_dtype}: {sizes}: {told}", holds


class StageCheck:
    """One random layer over a pool that holds NaN wherever no token was."""

    def __init__(
        self, kernels: KernelSet, sizes: LayerSizes, kv_dtype: str, layout: str, rng: np.random.Generator
    ) -> None:
        self._layer, self._rng = RandomLayer(sizes, rng), rng
        self._kernels, self._kv_dtype = kernels, kv_dtype
        self._ops = CudaOps(kernels, CudaDriver())
        self._model = self._layer.model(self._ops)
        self._ops.check_loaded()
        self._block = BlockShape.of(kv_dtype, layout, 1, sizes.kv_heads, 16, sizes.head_dim)

    def tolerance(self, name: str) -> float:
        """The relative error that rounding to bf16, or float32, allows a stage; `exact` ones allow none."""
        if name in ("committed", "token"):
            return 0.0
        is_fast = isinstance(self._kernels, FastKernels)
        if name == "kv":
            return {"bf16": 4e-3, "f16": 5e-4, "f32": 2e-6}[self._kv_dtype]
        if name == "router" and is_fast:  # few outputs, whose sums cancel
            return 1.5e-2
        return 8e-3 if is_fast else 4e-6

    def errors(self, streams: list[tuple[int, int]]) -> dict[str, float]:
        """Of one step with these streams: the relative error of each stage, in the norm."""
        s, shape = self._layer.sizes, self._layer.shape
        made = self._make(streams)
        self._poison(made)
        step = self._model.begin(
            batch := batch_of([(one, count) for one, (_, count) in zip(made, streams, strict=True)], 16), self._pool
        )
        sampled = self._model.forward(step)
        kv = self._kv_rows(batch.num_tokens)
        self._model.commit(step)
        positions = np.array(batch.positions, np.float64)
        found = {name: self._scratch(name, batch.num_tokens, size) for name, size in self._sizes().items()}
        x = twins.weights(self._layer.embedding)[batch.token_ids]
        a = self._layer.attention
        normed = twins.rms_norm(x, twins.values(a.input_norm), shape.rms_norm_eps)
        qkv = np.concatenate([twins.linear(part, normed) for part in (a.q_proj, a.k_proj, a.v_proj)], -1)
        norms = tuple(None if part is None else twins.values(part) for part in (a.q_norm, a.k_norm))
        q, k, v = twins.heads(found["qkv"], (norms[0], norms[1]), positions, shape)
        errors = {"qkv": _error(found["qkv"], qkv)}
        errors["q"] = _error(found["q"].reshape(q.shape), q)
        errors["kv"] = _error(kv, np.stack((k, v), 1))
        attended = self._attended(batch, found["q"].reshape(q.shape), kv, shape)
        errors["attended"] = _error(found["attended"].reshape(q.shape), attended)
        middle = x + twins.linear(a.o_proj, found["attended"])
        errors |= self._mlp_errors(batch.num_tokens, middle, found)
        final = twins.rms_norm(found["hidden"][batch.sample_rows], twins.values(self._layer.norm), self._layer.eps)
        logits = self._ops.scratch("logits")[: len(batch.sample_rows) * s.vocab].reshape(-1, s.vocab)
        errors["logits"] = _error(logits, twins.linear(self._layer.head, final))
        wanted = sample_rows(logits, batch.sampling).token_ids
        errors["token"] = float((wanted != sampled.token_ids).mean())
        errors["committed"] = self._committed_differ(batch, kv)
        return errors

    def _mlp_errors(self, rows: int, middle: Array, found: dict[str, Array]) -> dict[str, float]:
        mlp, s = self._layer.mlp, self._layer.sizes
        normed = twins.rms_norm(middle, twins.values(mlp.norm), self._layer.eps)
        gate, up, down = (twins.stack(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        if isinstance(mlp, MlpTensors):
            act = twins.gated(gate, up, normed)
            out = middle + found["act"] @ down.T
            return {"act": _error(found["act"], act), "hidden": _error(found["hidden"], out)}
        logits = twins.linear(mlp.router, normed)
        errors = {} if isinstance(self._kernels, PlainKernels) else {"router": _error(found["router"], logits)}
        chosen, chances = twins.route(self._logits_of_router(found, logits), self._layer.moe_shape)
        act = np.zeros((rows, s.per_token, s.width))
        out = middle.copy()
        computed = found["act"].reshape(act.shape)
        for row in range(rows):
            for rank, expert in enumerate(chosen[row]):
                act[row, rank] = twins.gated(gate[expert], up[expert], normed[row : row + 1])[0]
                out[row] += chances[row, rank] * (down[expert] @ computed[row, rank])
        return errors | {"act": _error(computed, act), "hidden": _error(found["hidden"], out)}

    def _logits_of_router(self, found: dict[str, Array], logits: Array) -> Array:
        """The fast kernels' own; the plain ones overwrite theirs, but are as good as the twin's."""
        return logits if isinstance(self._kernels, PlainKernels) else found["router"]

    def _attended(self, batch: Any, q: Array, kv: Array, shape: Any) -> Array:
        out = np.empty(q.shape)
        for index in range(batch.num_seqs):
            first, end = batch.cu_seqlens[index : index + 2]
            past = self._past[index]  # [context, 2, K, D]
            both = np.concatenate((past, kv[first:end]))
            for row in range(first, end):
                seen = both[: len(past) + row - first + 1]
                out[row] = twins.attention(q[row], seen[:, 0], seen[:, 1], shape)
        return out

    def _make(self, streams: list[tuple[int, int]]) -> list[Stream]:
        """Random tokens over shuffled blocks; the last stream repeats one token, so that its rows choose the same experts."""
        needed = [-(-(context + count) // 16) for context, count in streams]
        blocks = self._rng.permutation(sum(needed) + 3).tolist()
        made = []
        for index, ((context, count), blocks_needed) in enumerate(zip(streams, needed, strict=True)):
            tokens = self._rng.integers(0, self._layer.sizes.vocab, context + count).tolist()
            if index == len(streams) - 1:
                tokens = [tokens[-1]] * len(tokens)
            params = SamplingParams(temperature=float(index % 2), seed=index)
            made.append(Stream(tokens, [blocks.pop() for _ in range(blocks_needed)], context, params))
        return made

    def _poison(self, streams: list[Stream]) -> None:
        """A new pool: random K/V for the tokens that are in it, NaN elsewhere."""
        s, shape = self._layer.sizes, self._block
        dtype = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[self._kv_dtype]
        num_blocks = sum(len(stream.blocks) for stream in streams) + 3
        pool = np.full(
            (num_blocks, shape.stride_bytes // shape.element_bytes), 0x7FC0 if dtype is np.uint16 else np.nan, dtype
        )
        rows = pool[:, : shape.block_bytes // shape.element_bytes]
        order = (2, s.kv_heads, 16) if shape.layout == "hnd" else (2, 16, s.kv_heads)
        blocks = rows.reshape(num_blocks, *order, s.head_dim)
        blocks = blocks if shape.layout == "hnd" else blocks.transpose(0, 1, 3, 2, 4)  # [blocks, 2, K, 16, D]
        self._past = []
        for stream in streams:
            past = self._rng.standard_normal((stream.num_computed, 2, s.kv_heads, s.head_dim))
            bits = to_bf16(past) if dtype is np.uint16 else past.astype(dtype)
            at = np.arange(stream.num_computed)
            blocks[np.array(stream.blocks, np.int64)[at // 16], :, :, at % 16] = bits
            self._past.append(_widened(bits))
        # Made by the GPU, so that it stays where it is.
        self._memory = mx.array(pool.view(np.uint16)) + mx.array(0, mx.uint16)
        mx.eval(self._memory)
        self._host_shape = pool.shape
        self._pool = GpuPool(addresses([self._memory])[0], num_blocks, shape, self._kv_dtype)

    def _kv_rows(self, rows: int) -> Array:
        """The step's K/V `[T, 2, K, D]`, as they will be in the pool."""
        s = self._layer.sizes
        flat = self._ops.scratch("kv")
        if isinstance(self._kernels, PlainKernels) and self._kv_dtype != "f32":
            flat = _widened(flat.view(np.uint16 if self._kv_dtype == "bf16" else np.float16))
        return flat[: rows * 2 * s.kv_heads * s.head_dim].reshape(rows, 2, s.kv_heads, s.head_dim).astype(np.float64)

    def _committed_differ(self, batch: Any, kv: Array) -> float:
        """The share of the step's rows that are not in their slots."""
        s, shape = self._layer.sizes, self._block
        dtype = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[self._kv_dtype]
        pool = np.array(self._memory + mx.array(0, mx.uint16)).view(dtype).reshape(self._host_shape)
        rows = pool[:, : shape.block_bytes // shape.element_bytes]
        order = (2, s.kv_heads, 16) if shape.layout == "hnd" else (2, 16, s.kv_heads)
        blocks = rows.reshape(self._host_shape[0], *order, s.head_dim)
        blocks = blocks if shape.layout == "hnd" else blocks.transpose(0, 1, 3, 2, 4)
        stored = _widened(blocks[batch.slot_mapping // 16, :, :, batch.slot_mapping % 16])
        return float((stored != kv).any(axis=(1, 2, 3)).mean())

    def _sizes(self) -> dict[str, int]:
        s = self._layer.sizes
        q_size, per_token = s.heads * s.head_dim, s.per_token if s.experts else 1
        sizes = {"qkv": q_size + 2 * s.kv_heads * s.head_dim, "q": q_size, "attended": q_size, "hidden": s.hidden}
        return sizes | {"act": per_token * s.width} | ({"router": s.experts} if s.experts else {})

    def _scratch(self, name: str, rows: int, size: int) -> Array:
        found = self._ops.scratch(name)[: rows * size].reshape(rows, size).astype(np.float64)
        if isinstance(self._kernels, FastKernels) and name in ("attended", "act"):
            order = np.arange(size).reshape(-1, 8)  # the twin of `shuffled`
            places = (order & ~7) | ((order & 3) << 1) | (order >> 2 & 1)
            found = found[:, places.reshape(-1)]
        return found


def _widened(bits: Array) -> Array:
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32) if bits.dtype == np.uint16 else bits
    return wide.astype(np.float64)


def _error(got: Array, wanted: Array) -> float:
    """Of the worst row, in the norm; relative to the row or to the average one, a row of few small outputs being no measure."""
    got, wanted = got.reshape(len(got), -1), wanted.reshape(len(wanted), -1)
    sizes = np.linalg.norm(wanted, axis=1)
    errors = np.linalg.norm(got - wanted, axis=1) / np.maximum(sizes, sizes.mean())
    return float(errors.max(initial=0.0)) if np.isfinite(errors).all() else float("inf")
