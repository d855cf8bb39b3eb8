"""Steps a model without an engine: any sequences, in any order, in any chunks, over a pool file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protos.pool_format import BlockShape, DataHeader
from services.decoder.batch import Batch
from services.decoder.kv_view import ContiguousKv, KvView, PagedKv
from services.decoder.loader import open_checkpoint
from services.decoder.model_config import ModelConfig, read_model_config
from services.decoder.models import Model, load_model
from services.decoder.ops.base import Ops
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling

GREEDY = SamplingParams()


def load(directory: Path, ops: Ops) -> Model:
    """A checkpoint's model."""
    checkpoint = open_checkpoint(directory)
    return load_model(checkpoint, read_model_config(checkpoint), ops)


def make_pool(
    directory: Path,
    config: ModelConfig,
    kv_dtype: str = "f32",
    block_size: int = 16,
    num_blocks: int = 64,
    layout: str = "hnd",
) -> PagedKv:
    """A pool file as the manager makes it, mapped."""
    sizes = (config.num_hidden_layers, config.num_key_value_heads, block_size, config.head_dim)
    header = DataHeader(bytes(range(16)), num_blocks, BlockShape.of(kv_dtype, layout, *sizes))
    path = directory / f"{kv_dtype}-{layout}-{block_size}-{num_blocks}.kv"
    with path.open("wb") as file:
        file.write(header.pack())
        file.truncate(header.file_bytes)
    return PagedKv(path, kv_dtype)


def make_contiguous(
    config: ModelConfig, kv_dtype: str = "f32", kv_capacity: int = 200, max_seqs: int = 32, layout: str = "hnd"
) -> ContiguousKv:
    """Contiguous caches for a model."""
    return ContiguousKv(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype=kv_dtype,
        kv_capacity=kv_capacity,
        max_seqs=max_seqs,
        layout=layout,
    )


class ModelDriver:
    """Holds the tables and lengths of its sequences; blocks are handed out from a list, paged or contiguous."""

    def __init__(self, model: Model, kv: KvView, free_blocks: Sequence[int], table_padding: int = 0) -> None:
        self.model = model
        self.kv = kv
        self.free_blocks = list(free_blocks)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self._table_padding = table_padding

    def batch(self, chunks: Mapping[str, Sequence[int]]) -> Batch:
        """The next tokens of some sequences, by name, as one batch that samples after each chunk's last."""
        block_size = self.kv.shape.block_size
        positions, slots = [], []
        for name, tokens in chunks.items():
            table, start = self.tables.setdefault(name, []), self.lengths.setdefault(name, 0)
            while len(table) * block_size < start + len(tokens):
                table.append(self.free_blocks.pop())
            for position in range(start, start + len(tokens)):
                positions.append(position)
                slots.append(table[position // block_size] * block_size + position % block_size)
        width = max(len(self.tables[name]) for name in chunks) + 1
        tables = np.full((len(chunks), width), self._table_padding, np.int32)
        for index, name in enumerate(chunks):
            tables[index, : len(self.tables[name])] = self.tables[name]
        cu_seqlens = np.cumsum([0, *(len(tokens) for tokens in chunks.values())]).astype(np.int32)
        return Batch(
            token_ids=np.array([token for tokens in chunks.values() for token in tokens], np.int32),
            positions=np.array(positions, np.int32),
            cu_seqlens=cu_seqlens,
            context_lens=np.array([self.lengths[name] for name in chunks], np.int32),
            block_tables=tables,
            slot_mapping=np.array(slots, np.int64),
            sample_rows=cu_seqlens[1:] - 1,
            sampling=[RowSampling(GREEDY, 0, 0, None)] * len(chunks),
        )

    def logits(self, chunks: Mapping[str, Sequence[int]]) -> dict[str, npt.NDArray[np.float32]]:
        """One step; the logits after each chunk."""
        step = self.model.begin(self.batch(chunks), self.kv)
        rows = self.model.logits(step)
        self._commit(step, chunks)
        return dict(zip(chunks, rows, strict=True))

    def sample(self, chunks: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """One step; the greedy token after each chunk."""
        step = self.model.begin(self.batch(chunks), self.kv)
        token_ids = self.model.forward(step).token_ids.tolist()
        self._commit(step, chunks)
        return dict(zip(chunks, token_ids, strict=True))

    def _commit(self, step: object, chunks: Mapping[str, Sequence[int]]) -> None:
        self.model.commit(step)
        for name, tokens in chunks.items():
            self.lengths[name] += len(tokens)


def generate_greedy(
    driver: ModelDriver,
    prompts: Mapping[str, Sequence[int]],
    num_tokens: int,
    rng: np.random.Generator,
    max_chunk: int = 13,
) -> dict[str, list[int]]:
    """Continuous batching in small: prompts arrive one or two a step, are prefilled in random chunks, and decode together."""
    waiting, left = list(prompts), {name: list(tokens) for name, tokens in prompts.items()}
    running: list[str] = []
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    while waiting or running:
        running += [waiting.pop(0) for _ in range(min(len(waiting), int(rng.integers(0, 3))))]
        if not running:
            continue
        order = [running[index] for index in rng.permutation(len(running))]
        chunks = {name: left[name][: int(rng.integers(1, max_chunk + 1))] for name in order}
        for name, token_id in driver.sample(chunks).items():
            left[name] = left[name][len(chunks[name]) :]
            if not left[name]:
                outputs[name].append(token_id)
                left[name] = [token_id]
        running = [name for name in running if len(outputs[name]) < num_tokens]
    return outputs
