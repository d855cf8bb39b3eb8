"""Our step times against llama.cpp's, taking turns in one run: one JSON line a batch size and context.

    python -m tests.bench.duel --model DIR --gguf FILE --peer-python VENV/bin/python --batch 1,4,8 --context 64,1024
    python -m tests.bench.duel --model DIR --gguf FILE --peer-python VENV/bin/python --batch "" --prefill 512,2048

FILE is the same geometry and quantisation for llama.cpp, VENV has llama-cpp-python. Each round is a few steps of theirs, a plain
read of our weights with all threads, and a few steps of ours; `ratio` is the median over rounds of our median step over theirs,
and bytes a second are those of our median step against the median read. Both sides are fed random tokens over random K/V.
A comparison whose sides read numbers of distinct experts more than 10 % apart is `void`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from services.decoder.loader import Checkpoint
from tests.bench.decode_step import WARM_UP_STEPS, Bench, make_bench_ops
from tests.bench.machine import describe_cpu

PEER = Path(__file__).with_name("llama_cpp_peer.py")
EXPERTS_APART = 0.1
SETTLE_S = 0.02  # threads of the side whose turn it was spin for a while
READ_BYTES = 1 << 30
# Issue of record: the share of a plain read at batch 1, and what a step may cost against llama.cpp's.
SHARE_OF_READ, FLOOR_SHARE, PREFILL_GAIN = 0.8, 0.7, 1.5


class Peer:
    """The other side's process; see llama_cpp_peer.py."""

    def __init__(self, python: Path, gguf: Path, threads: int) -> None:
        command = [str(python), str(PEER), str(gguf), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        """What a method returns; raises RuntimeError when the process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the peer was started without pipes")
        stdin.write(json.dumps([method, *arguments]) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended in {method} with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Lets the process end, and waits for it."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


class WeightBytes:
    """What a step reads of a checkpoint, and the arrays to read as a measure of memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
        experts = {name: array for name, array in arrays.items() if ".switch_mlp." in name}
        self._experts = sum(array.nbytes for array in experts.values())
        self._num_experts = next((array.shape[0] for array in experts.values()), 1)
        self._rest = sum(
            array.nbytes for name, array in arrays.items() if name not in experts and "embed_tokens" not in name
        )
        if not any(name.startswith("lm_head.") for name in arrays):  # the embedding is the head
            self._rest += sum(array.nbytes for name, array in arrays.items() if "embed_tokens" in name)
        self._large = sorted(arrays.values(), key=lambda array: -array.nbytes)

    def of_step(self, experts_per_layer: float) -> float:
        """Bytes of weights, each read once."""
        return self._rest + self._experts * experts_per_layer / self._num_experts

    def time_read(self, ops: Any) -> float:
        """Bytes a second of a plain read of about READ_BYTES of them."""
        num_bytes, began = 0, time.perf_counter()
        for array in self._large:
            if num_bytes >= READ_BYTES:
                break
            ops.read_memory(array)
            num_bytes += array.nbytes
        return num_bytes / (time.perf_counter() - began)


def is_void(ours: float, theirs: float) -> bool:
    """Whether the sides read such different numbers of experts that their times say nothing."""
    return abs(ours / theirs - 1) > EXPERTS_APART


class Duel:
    """One model on both sides."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        threads = arguments.threads or len(os.sched_getaffinity(0))
        self._rounds: int = arguments.rounds
        self._steps: int = arguments.steps
        self._ops = make_bench_ops("native", "fast", threads, arguments.isa)
        self._peer = Peer(arguments.peer_python, arguments.gguf, threads)
        self._peer.ask("about")  # its load takes memory and the page cache; ours comes after
        self._bench = Bench(arguments.model, self._ops, "bf16")
        self._bytes = WeightBytes(self._bench.checkpoint)

    def about(self) -> dict[str, Any]:
        """The processor and what each side uses of it."""
        ours = {"numerics_id": self._ops.numerics_id, "isa": getattr(self._ops, "isa", "")}
        return describe_cpu() | {"ours": ours, "llama_cpp": self._peer.ask("about")}

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """Rounds of steps, by turns."""
        num_steps = self._rounds * self._steps
        theirs: list[list[float]] = []
        reads: list[float] = []
        self._peer.ask("open", batch, context, num_steps + WARM_UP_STEPS)
        self._peer.ask("step", WARM_UP_STEPS)

        def before_step(index: int) -> None:
            if index % self._steps:
                return
            time.sleep(SETTLE_S)
            theirs.append(self._peer.ask("step", self._steps)["step_ms"])
            time.sleep(SETTLE_S)
            reads.append(self._bytes.time_read(self._ops))

        result = self._bench.decode(batch, context, num_steps, before_step, fill=True)
        ours = np.array(result["times"]).reshape(self._rounds, self._steps) * 1e3
        ratios = np.median(ours, axis=1) / np.median(np.array(theirs), axis=1)
        experts = {
            "ours": result["experts_per_layer"],
            "llama_cpp": round(
                self._peer.ask("experts", batch, context, num_steps + WARM_UP_STEPS, WARM_UP_STEPS)[
                    "experts_per_layer"
                ],
                1,
            ),
        }
        figures = {
            "batch": batch,
            "context": context,
            "ours_ms": round(float(np.median(ours)), 1),
            "llama_cpp_ms": round(float(np.median(np.array(theirs))), 1),
            "ratio": round(float(np.median(ratios)), 3),
            "ratios": [round(float(ratio), 3) for ratio in ratios],
            "experts_per_layer": experts,
            "void": is_void(experts["ours"], experts["llama_cpp"]),
        }
        return figures | self._memory(figures, statistics.median(reads))

    def _memory(self, figures: dict[str, Any], read: float) -> dict[str, Any]:
        num_bytes = self._bytes.of_step(figures["experts_per_layer"]["ours"])
        share = num_bytes / (figures["ours_ms"] / 1e3) / read
        floor_ms = num_bytes / (FLOOR_SHARE * read) * 1e3
        batch, ratio = figures["batch"], figures["ratio"]
        if batch == 1:
            met = ratio < 1 and share >= SHARE_OF_READ
        else:
            met = ratio <= 0.75 if batch < 8 else ratio <= 0.65 or figures["ours_ms"] <= floor_ms
        return {
            "weight_gb": round(num_bytes / 1e9, 3),
            "gb_per_s": round(num_bytes / figures["ours_ms"] / 1e6, 1),
            "plain_read_gb_per_s": round(read / 1e9, 1),
            "share_of_read": round(share, 2),
            "read_once_at_70_percent_ms": round(floor_ms, 1),
            "met": met and not figures["void"],
        }

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        """One prompt by turns; a gain is their time over ours."""
        ours, theirs = [], []
        for _ in range(max(1, self._rounds // 2)):
            theirs.append(self._peer.ask("prefill", num_tokens)["ms"])
            time.sleep(SETTLE_S)
            ours.append(self._bench.prefill(num_tokens, 512)["ms"])
        gain = statistics.median(their / our for our, their in zip(ours, theirs, strict=True))
        return {
            "prefill": num_tokens,
            "ours_tokens_per_s": round(num_tokens / statistics.median(ours) * 1e3, 1),
            "llama_cpp_tokens_per_s": round(num_tokens / statistics.median(theirs) * 1e3, 1),
            "gain": round(gain, 2),
            "met": gain >= PREFILL_GAIN,
        }

    def end(self) -> None:
        """Ends the peer."""
        self._peer.end()


def mlx_lm_step(python: Path, model: Path) -> dict[str, Any]:
    """mlx-lm's time for a token of one sequence, in an environment that has it."""
    code = (
        "import sys, time\nfrom pathlib import Path\nimport mlx.core as mx\nfrom mlx_lm.models.cache import make_prompt_cache\n"
        "from mlx_lm.utils import load_model\nmodel, _ = load_model(Path(sys.argv[1]))\ncache = make_prompt_cache(model)\n"
        "mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache))\ntimes = []\n"
        "for token in (5, 77, 4242):\n    began = time.perf_counter()\n"
        "    mx.eval(model(mx.array([[token]]), cache=cache))\n    times.append(time.perf_counter() - began)\n"
        "print(sorted(times)[1] * 1e3)"
    )
    done = subprocess.run([str(python), "-c", code, str(model)], stdout=subprocess.PIPE, text=True, check=True)
    return {"batch": 1, "mlx_lm_ms": round(float(done.stdout), 1)}


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The machine, then the figures."""
    duel = Duel(arguments)
    try:
        yield duel.about()
        for context in _numbers(arguments.context):
            for batch in _numbers(arguments.batch):
                yield duel.decode(batch, context)
        for num_tokens in _numbers(arguments.prefill):
            yield duel.prefill(num_tokens)
    finally:
        duel.end()
    if arguments.mlx_python:
        yield mlx_lm_step(arguments.mlx_python, arguments.model)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    """Prints one JSON line a figure."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # lines of results only on stdout
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, for us")
    parser.add_argument("--gguf", type=Path, required=True, help="the same geometry, for llama.cpp")
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="Python of an environment with llama-cpp-python"
    )
    parser.add_argument(
        "--mlx-python", type=Path, help="Python of an environment with mlx-lm: time that too, on --model"
    )
    parser.add_argument("--batch", default="1,4,8,16,32", help="batch sizes; empty for none")
    parser.add_argument("--context", default="64,1024", help="tokens of each sequence before the first timed step")
    parser.add_argument("--prefill", default="", metavar="N", help="prompt lengths to time as well, such as 512,2048")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, help="of both sides (default: the cores available)")
    parser.add_argument("--isa", default="", help="a set of native kernels, such as avx2 (default: the best)")
    for result in results(parser.parse_args()):
        print(json.dumps(result), flush=True)
        if result.get("void"):
            print("the sides read different numbers of experts: no comparison", file=sys.stderr)


if __name__ == "__main__":
    main()
