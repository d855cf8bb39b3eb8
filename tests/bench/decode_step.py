"""Step times of the engine in one process, over caches of its own: one JSON line a batch size.

    python -m tests.bench.decode_step --model DIR --backend native --batch 1,4,8,16,32 --context 64 --steps 16
    python -m tests.bench.decode_step --model DIR --backend native --prefill 512

Every decode step is fed random tokens in place of the sampled ones, so that the experts it reads are as many as a real mix of
streams would read. A step's time is from one step's begin to the next one's: scheduling, sampling and events included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from services.decoder.batch import Batch
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.kv_view import NUMPY_TYPES, ContiguousKv, KvView
from services.decoder.leases import KvGeometry
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import ModelConfig, read_model_config
from services.decoder.models import load_model
from services.decoder.ops.base import Ops
from services.decoder.page_mapper import map_pages
from services.decoder.request import DecodeRequest, Event, Failed, Finished, SamplingParams
from services.decoder.sampler import Sampled
from tests.bench.machine import describe_cpu

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class StepTime:
    """One step of the engine: the last one's end, its own begin, its rows and sequences."""

    arrived: float
    began: float
    num_tokens: int
    num_seqs: int


class RandomTokens:
    """A model whose decode steps see random tokens; notes when each step began, and how many tokens it had.

    `before_step` is called before each step in which all num_seqs sequences decode, with how many such steps have been; what it
    takes is no part of any step's time. With `fill`, all other steps compute nothing, but write random K/V rows.
    """

    def __init__(
        self, model: Any, vocab_size: int, num_seqs: int, before_step: Callable[[int], None] | None, fill: bool
    ) -> None:
        self.steps: list[StepTime] = []
        self._model = model
        self._vocab_size = vocab_size
        self._num_seqs = num_seqs
        self._before_step = before_step
        self._fill = fill
        self._num_decodes = 0
        self._rng = np.random.default_rng(1)

    def begin(self, batch: Batch, kv: KvView) -> Any:
        """See StepModel."""
        arrived = time.perf_counter()
        all_decode = batch.num_tokens == batch.num_seqs == self._num_seqs and bool(np.all(batch.context_lens))
        if all_decode:
            if self._before_step:
                self._before_step(self._num_decodes)
            self._num_decodes += 1
        self.steps.append(StepTime(arrived, time.perf_counter(), batch.num_tokens, batch.num_seqs))
        if batch.num_tokens == batch.num_seqs:
            batch.token_ids[:] = self._rng.integers(0, self._vocab_size, batch.num_tokens)
        return self._model.begin(batch, kv) if all_decode or not self._fill else _Filled(batch, kv)

    def forward(self, step: Any) -> Any:
        """See StepModel."""
        if not isinstance(step, _Filled):
            return self._model.forward(step)
        count = len(step.batch.sample_rows)
        ids = self._rng.integers(0, self._vocab_size, count).astype(np.int32)
        return Sampled(ids, [None] * count, [()] * count)

    def commit(self, step: Any) -> None:
        """See StepModel."""
        if isinstance(step, _Filled):
            step.write(self._rng)
        else:
            self._model.commit(step)


@dataclass(frozen=True, eq=False)
class _Filled:
    """A step that is not computed: its rows of K/V are random."""

    batch: Batch
    kv: KvView

    def write(self, rng: np.random.Generator) -> None:
        batch, shape = self.batch, self.kv.shape
        kind = NUMPY_TYPES[self.kv.kv_dtype]
        for slot in batch.slot_mapping:
            block_id, offset = divmod(int(slot), shape.block_size)
            size = (shape.num_layers, 2, shape.num_kv_heads, shape.head_dim)
            row = rng.standard_normal(size, np.float32)
            is_bf16 = self.kv.kv_dtype == "bf16"
            self.kv.block(block_id)[:, :, :, offset, :] = (row.view(np.uint32) >> 16 if is_bf16 else row).astype(kind)


class Bench:
    """One loaded model; each run starts an engine of its own on it."""

    def __init__(self, directory: Path, ops: Ops, kv_dtype: str, kv_layout: str = "hnd") -> None:
        self.checkpoint = checkpoint = open_checkpoint(directory)
        if ops.backend == "native":
            map_pages(checkpoint.mappings).join()  # as a decoder does that has run for a few seconds
        self.config: ModelConfig = read_model_config(checkpoint)
        self.ops = ops
        self._kv_dtype, self._kv_layout = kv_dtype, kv_layout
        self._model = load_model(checkpoint, self.config, ops)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        num_outputs: int,
        batched_tokens: int,
        before_step: Callable[[int], None] | None = None,
        fill: bool = False,
    ) -> list[StepTime]:
        """Serves all prompts at once; what each step was (see RandomTokens), and last the time of the end."""
        capacity = max(len(prompt) for prompt in prompts) + num_outputs
        model = RandomTokens(self._model, self.config.vocab_size, len(prompts), before_step, fill)
        config = self.config
        geometry = KvGeometry(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self._kv_dtype, bytes(32)
        )
        leases = ContiguousLeases(lambda _: self._caches(capacity, len(prompts)))
        settings = EngineSettings(
            max_seqs=len(prompts), kv_capacity=capacity, max_num_batched_tokens=max(batched_tokens, len(prompts))
        )
        events: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()

        def emit(batch: Sequence[tuple[str, Event]]) -> None:
            for event in batch:
                events.put(event)

        engine = Engine(lambda: LoadedModel(model, geometry, self.ops.numerics_id), leases, settings, emit)
        engine.start()
        for index, prompt in enumerate(prompts):
            engine.submit(DecodeRequest(f"r{index}", prompt, SamplingParams(), num_outputs))
        running = len(prompts)
        while running:
            _, event = events.get()
            if isinstance(event, Failed):
                raise RuntimeError(event.error)
            running -= isinstance(event, Finished)
        engine.stop(0)
        end = time.perf_counter()
        return [*model.steps, StepTime(end, end, 0, 0)]

    def _caches(self, capacity: int, count: int) -> ContiguousKv:
        config = self.config
        return ContiguousKv(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            kv_dtype=self._kv_dtype,
            kv_capacity=capacity,
            max_seqs=count,
            layout=self._kv_layout,
        )

    def decode(
        self,
        batch: int,
        context: int,
        num_steps: int,
        before_step: Callable[[int], None] | None = None,
        fill: bool = False,
    ) -> dict[str, Any]:
        """Median time of the steps in which all sequences decode, and the distinct experts that those steps read a layer.

        `before_step` is called before each timed step; with `fill`, the context is random K/V instead of a computed prompt.
        """
        rng = np.random.default_rng(batch)
        prompts = [rng.integers(0, self.config.vocab_size, context).tolist() for _ in range(batch)]
        routing: dict[str, float] = {}

        def before(index: int) -> None:
            if index == WARM_UP_STEPS:
                self._routing()  # what came before is not asked for
            elif index == WARM_UP_STEPS + num_steps:
                routing.update(self._routing())
            if before_step and 0 <= index - WARM_UP_STEPS < num_steps:
                before_step(index - WARM_UP_STEPS)

        steps = self.run(prompts, num_steps + WARM_UP_STEPS + batch, batch * context if fill else 512, before, fill)
        routing = routing or self._routing()  # a single sequence ends with the last timed step
        times = [
            after.arrived - step.began
            for step, after in itertools.pairwise(steps)
            if step.num_tokens == batch == step.num_seqs
        ][WARM_UP_STEPS : WARM_UP_STEPS + num_steps]
        median = statistics.median(times)
        result = {"batch": batch, "context": context, "step_ms": round(median * 1e3, 2)}
        return result | {"tokens_per_s": round(batch / median, 2), "times": times} | routing

    def prefill(self, num_tokens: int, batched_tokens: int) -> dict[str, Any]:
        """One prompt, in chunks of batched_tokens."""
        prompt = np.random.default_rng(7).integers(0, self.config.vocab_size, num_tokens).tolist()
        steps = self.run([prompt], 1, batched_tokens)
        seconds = steps[-1].arrived - steps[0].began
        return {"prefill": num_tokens, "ms": round(seconds * 1e3, 1), "tokens_per_s": round(num_tokens / seconds, 2)}

    def _routing(self) -> dict[str, float]:
        take = getattr(self.ops, "take_routing", None)
        blocks, experts = take() if take else (0, 0)
        return {"experts_per_layer": round(experts / blocks, 1)} if blocks else {}


def make_bench_ops(backend: str, precision: str, threads: int | None, isa: str = "") -> Ops:
    """A backend by name."""
    if backend == "native":
        from services.decoder.ops.native import NativeOps

        return NativeOps(precision, threads, isa)
    from services.decoder.ops.mlx import MlxOps

    return MlxOps()


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One a batch size, or one for the prefill."""
    ops = make_bench_ops(arguments.backend, arguments.precision, arguments.threads, arguments.isa)
    bench = Bench(arguments.model, ops, arguments.kv_dtype, arguments.kv_layout)
    kv = f"{arguments.kv_dtype} {arguments.kv_layout}"
    same = {"backend": arguments.backend, "numerics_id": ops.numerics_id, "kv": kv}
    if arguments.prefill:
        yield bench.prefill(arguments.prefill, arguments.prefill_chunk) | same
        return
    for batch in (int(size) for size in arguments.batch.split(",")):
        result = bench.decode(batch, arguments.context, arguments.steps, fill=arguments.fill)
        del result["times"]
        yield result | same


def main() -> None:
    """Prints the figures on stdout and the machine on stderr."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # lines of results only on stdout
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--backend", choices=["native", "mlx"], default="native")
    parser.add_argument("--precision", choices=["fast", "exact"], default="fast", help="of the native backend")
    parser.add_argument("--threads", type=int, help="of the native backend (default: the cores available)")
    parser.add_argument("--isa", default="", help="a set of native kernels, such as avx2 (default: the best)")
    parser.add_argument("--kv-dtype", choices=["bf16", "f16", "f32", "int8"], default="bf16")
    parser.add_argument("--kv-layout", choices=["hnd", "nhd"], default="hnd")
    parser.add_argument("--batch", default="1", help="batch sizes, such as 1,4,8")
    parser.add_argument("--context", type=int, default=64, help="tokens of each sequence before the first timed step")
    parser.add_argument("--fill", action="store_true", help="random K/V in place of computed prompts, to begin sooner")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of each batch size")
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="time one prompt of N tokens instead")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="tokens of a prefill step")
    print(json.dumps(describe_cpu()), file=sys.stderr)
    for result in results(parser.parse_args()):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
