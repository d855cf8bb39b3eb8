"""llama.cpp on the other side of a duel: a process of its own that obeys one JSON line after another.

    python llama_cpp_peer.py MODEL.gguf THREADS

It runs in a virtual environment with llama-cpp-python and NumPy, without this project. Every sequence holds the K/V of a
random prompt; every step is fed random tokens. The distinct experts of a layer are counted in a pass of its own, over the same tokens,
since looking at tensors slows a step down.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

BATCH_TOKENS, MICROBATCH_TOKENS = 2048, 512
MAX_PROMPT_TOKENS = 4096  # computed in all, for a minute; beyond, all sequences hold a copy of one prompt
# Of `struct ggml_tensor`: after the type and the buffer come four lengths, then four strides in bytes.
LENGTHS_AT, STRIDES_AT = 16, 48


class ExpertCount:
    """The callback that sees each layer's chosen experts."""

    def __init__(self) -> None:
        self.counting = False
        self.blocks = self.experts = 0
        base = llama_cpp.llama_cpp._lib
        self._name = base.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._size = base.ggml_nbytes
        self._size.restype, self._size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._read = base.ggml_backend_tensor_get
        self._read.restype = None
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, tensor: int, ask: bool, _: Any) -> bool:
        if not self.counting or not self._name(tensor).startswith(b"ffn_moe_topk"):
            return not ask
        if not ask:
            self.blocks += 1
            self.experts += len(np.unique(self._chosen(tensor)))
        return True

    def _chosen(self, tensor: int) -> Any:
        """int32 [tokens, chosen], a view of rows that are as long as there are experts."""
        chosen, tokens = (ctypes.c_int64 * 4).from_address(tensor + LENGTHS_AT)[:2]
        row_bytes = (ctypes.c_size_t * 4).from_address(tensor + STRIDES_AT)[1]
        data = np.zeros(tokens * row_bytes, np.uint8)
        self._read(tensor, data.ctypes.data, 0, self._size(tensor))
        return data.reshape(tokens, row_bytes)[:, : 4 * chosen].copy().view(np.int32)


class Peer:
    """One loaded model, and the context at hand."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._threads = threads
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._rows = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: Any = None

    def about(self) -> dict[str, Any]:
        """Version and the instruction sets that it was built for and found."""
        info = llama_cpp.llama_print_system_info().decode().split("|")
        return {"llama_cpp_python": llama_cpp.__version__, "isa": [part.strip() for part in info if "= 1" in part]}

    def open(self, batch: int, context: int, num_steps: int, experts: ExpertCount | None = None) -> dict[str, Any]:
        """`batch` sequences that hold `context` tokens each."""
        self.close()
        self._new_context(batch, context + num_steps + 1, experts)
        rng = np.random.default_rng(batch)
        prompts = rng.integers(0, self._vocab_size, (batch, context))
        self._steps = rng.integers(0, self._vocab_size, (num_steps, batch))
        self._position, self._next = context, 0
        # Sequences that share a prompt route more alike; the count of experts tells whether it mattered.
        own = batch if batch * context <= MAX_PROMPT_TOKENS else 1
        for seq in range(own):
            for at in range(0, context, BATCH_TOKENS):
                chunk = enumerate(prompts[seq, at : at + BATCH_TOKENS], at)
                self._decode([(int(token), position, seq) for position, token in chunk], last_only=True)
        for seq in range(own, batch):
            llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(self._context), 0, seq, 0, -1)
        return {}

    def _new_context(self, batch: int, tokens: int, experts: ExpertCount | None) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = batch * (-(-tokens // 256) * 256)
        parameters.n_batch, parameters.n_ubatch = BATCH_TOKENS, MICROBATCH_TOKENS
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = False
        if experts:
            parameters.cb_eval = experts.callback
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit("llama.cpp has no memory for the context")

    def step(self, count: int) -> dict[str, Any]:
        """Times `count` steps."""
        times = []
        for _ in range(count):
            rows = [(int(token), self._position, seq) for seq, token in enumerate(self._steps[self._next])]
            times.append(self._decode(rows) * 1e3)
            self._position += 1
            self._next += 1
        return {"step_ms": times}

    def experts(self, batch: int, context: int, num_steps: int, skip: int) -> dict[str, Any]:
        """Distinct experts of a layer in the same steps as after `open`, but for the first ones."""
        count = ExpertCount()
        self.open(batch, context, num_steps, count)
        self.step(skip)
        count.counting = True
        self.step(num_steps - skip)
        self.close()
        return {"experts_per_layer": count.experts / count.blocks}

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        """Times one prompt."""
        self.close()
        self._new_context(1, num_tokens, None)
        tokens = np.random.default_rng(7).integers(0, self._vocab_size, num_tokens)
        rows = [(int(token), position, 0) for position, token in enumerate(tokens)]
        seconds = sum(self._decode(rows[at : at + BATCH_TOKENS], True) for at in range(0, num_tokens, BATCH_TOKENS))
        self.close()
        return {"ms": seconds * 1e3}

    def close(self) -> dict[str, Any]:
        """Frees the context."""
        if self._context:
            llama_cpp.llama_free(self._context)
        self._context = None
        return {}

    def _decode(self, rows: list[tuple[int, int, int]], last_only: bool = False) -> float:
        self._rows.n_tokens = len(rows)
        for index, (token, position, seq) in enumerate(rows):
            self._rows.token[index], self._rows.pos[index] = token, position
            self._rows.n_seq_id[index], self._rows.seq_id[index][0] = 1, seq
            self._rows.logits[index] = not last_only or index == len(rows) - 1
        began = time.perf_counter()
        if llama_cpp.llama_decode(self._context, self._rows):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)
        return time.perf_counter() - began


def main() -> None:
    """Answers each line `["method", arguments...]` with one of JSON."""
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(peer, method)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
