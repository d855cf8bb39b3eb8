"""The `mlx` backend: a row's bits depend on its own sequence only, and a step leaves no trace but its commit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from services.decoder.kv_view import KvView, PagedKv
from services.decoder.loader import open_checkpoint
from services.decoder.models import Model
from services.decoder.ops import gathered_attention
from services.decoder.ops.base import LinearTensors
from services.decoder.ops.gathered_attention import TILE_TOKENS
from services.decoder.ops.mlx import MlxOps
from services.decoder.ops.mlx_weights import Linear
from tests.decoder.model_driver import ModelDriver, load, make_contiguous, make_pool
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint

CONFIGS = {
    "f32": TinyConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=24, num_experts_per_tok=3),
    "4bit": TinyConfig(bits=4, head_dim=32, mlp_only_layers=(1,), tie_word_embeddings=True, dtype="bf16"),
}
LENGTH = 2 * TILE_TOKENS + 9
TOKENS: list[int] = np.random.default_rng(3).integers(0, 96, LENGTH).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), CONFIGS[request.param], seed=11)


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory, MlxOps())


@pytest.fixture(scope="module")
def alone(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[npt.NDArray[np.float32]]]:
    """By kv dtype: the logits after each of TOKENS, fed one at a time to a sequence that is alone."""
    result = {}
    for kv_dtype in ("f32", "bf16", "f16", "int8"):
        driver = ModelDriver(model, make_pool(tmp_path_factory.mktemp("pool"), model.config, kv_dtype), range(1, 20))
        result[kv_dtype] = [driver.logits({"a": [token]})["a"] for token in TOKENS]
    return result


def _chunks(rng: np.random.Generator, max_chunk: int) -> Iterator[list[int]]:
    start = 0
    while start < LENGTH:
        size = int(rng.integers(1, max_chunk + 1))
        yield TOKENS[start : start + size]
        start += size


def _same_as_alone(
    driver: ModelDriver, chunks: Sequence[list[int]], expected: Sequence[npt.NDArray[np.float32]]
) -> None:
    end = 0
    for chunk in chunks:
        end += len(chunk)
        assert np.array_equal(driver.logits({"a": chunk})["a"], expected[end - 1]), end


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
@pytest.mark.parametrize(("block_size", "layout"), [(8, "hnd"), (8, "nhd"), (16, "nhd"), (32, "hnd"), (0, "nhd")])
def test_s13_bits_depend_on_neither_block_size_nor_layout_nor_chunks(
    tmp_path: Path, model: Model, alone: dict[str, list[Any]], kv_dtype: str, block_size: int, layout: str
) -> None:
    kv: KvView
    if block_size:
        kv = make_pool(tmp_path, model.config, kv_dtype, block_size, layout=layout)
        blocks = np.random.default_rng(block_size).permutation(64).tolist()
    else:
        kv = make_contiguous(model.config, kv_dtype, layout=layout)
        blocks = [kv.take()]
    for max_chunk in (LENGTH, 70, 5):
        rng = np.random.default_rng(max_chunk)
        chunks = [TOKENS] if max_chunk == LENGTH else list(_chunks(rng, max_chunk))
        _same_as_alone(ModelDriver(model, kv, blocks), chunks, alone[kv_dtype])


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
def test_bits_are_the_same_among_31_others(
    tmp_path: Path, model: Model, alone: dict[str, list[Any]], kv_dtype: str
) -> None:
    rng = np.random.default_rng(21)
    driver = ModelDriver(
        model, make_pool(tmp_path, model.config, kv_dtype, num_blocks=700), rng.permutation(700).tolist()
    )
    end = 0
    for chunk in _chunks(rng, 40):
        end += len(chunk)
        others = {f"other-{index}": rng.integers(0, 96, int(rng.choice([1, 1, 1, 7]))).tolist() for index in range(31)}
        names = rng.permutation(["a", *others]).tolist()  # anywhere in the batch
        logits = driver.logits({name: chunk if name == "a" else others[name] for name in names})
        assert np.array_equal(logits["a"], alone[kv_dtype][end - 1]), end


def test_bits_do_not_depend_on_how_many_scores_are_in_memory(
    tmp_path: Path, model: Model, alone: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for max_scores in (1, 7000, 1 << 30):
        monkeypatch.setattr(gathered_attention, "_MAX_SCORES", max_scores)
        driver = ModelDriver(model, make_pool(tmp_path, model.config, "f16"), range(1, 20))
        _same_as_alone(driver, [TOKENS], alone["f16"])


def _poison(pool: PagedKv, block_ids: Sequence[int]) -> None:
    for block_id in block_ids:
        pool.block_bytes(block_id)[...] = 0xFF  # NaN, or scales that are


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
def test_s27_padding_is_never_read_and_block_0_is_a_real_block(
    tmp_path: Path, model: Model, alone: dict[str, list[Any]], kv_dtype: str
) -> None:
    pool = make_pool(tmp_path, model.config, kv_dtype)
    _poison(pool, range(pool.num_blocks))  # the padding, other sequences' blocks, and stale rows in its own
    chunks = list(_chunks(np.random.default_rng(5), 20))
    driver = ModelDriver(model, pool, range(1, 40), table_padding=0)
    _same_as_alone(driver, chunks, alone[kv_dtype])
    # Two of one group, one without context: the other's table is longer.
    both = driver.logits({"a": TOKENS[:1], "b": TOKENS[:1]})
    assert np.isfinite(both["a"]).all()
    assert np.array_equal(both["b"], alone[kv_dtype][0])
    real = ModelDriver(model, pool, [*range(40, 60), 0], table_padding=63)
    _same_as_alone(real, chunks, alone[kv_dtype])
    assert real.tables["a"][0] == 0


def test_padding_may_even_be_out_of_range(tmp_path: Path, model: Model, alone: dict[str, list[Any]]) -> None:
    pool = make_pool(tmp_path, model.config, "f32")
    driver = ModelDriver(model, pool, range(1, 40), table_padding=-(2**31))
    _same_as_alone(driver, list(_chunks(np.random.default_rng(6), 50)), alone["f32"])


def test_s28_recycled_blocks_and_caches_start_empty(tmp_path: Path, model: Model, alone: dict[str, list[Any]]) -> None:
    kv = make_contiguous(model.config)
    cache = kv.take()
    kv.block(cache)[...] = np.nan
    for _ in range(2):
        _same_as_alone(ModelDriver(model, kv, [cache]), [TOKENS[:50], TOKENS[50:]], alone["f32"])


def test_s32_one_attention_call_per_layer_serves_the_whole_mixed_batch(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(directory, MlxOps())
    calls: list[tuple[int, int]] = []
    original = MlxOps.attention

    def attention(self: MlxOps, handle: Any, layer: int, q: Any, k: Any, v: Any, step: Any) -> Any:
        calls.append((layer, len(q)))
        return original(self, handle, layer, q, k, v, step)

    monkeypatch.setattr(MlxOps, "attention", attention)
    driver = ModelDriver(model, make_pool(tmp_path, model.config), range(64))
    driver.sample({"a": TOKENS[:9], "b": TOKENS[:3]})
    calls.clear()
    driver.sample({"a": [1], "b": [2], "new": TOKENS[:30]})
    assert calls == [(layer, 32) for layer in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize(("kv_dtype", "layout"), [("bf16", "hnd"), ("bf16", "nhd"), ("int8", "nhd")])
def test_a_step_writes_at_commit_only_and_only_its_slots(
    tmp_path: Path, model: Model, kv_dtype: str, layout: str
) -> None:
    pool = make_pool(tmp_path, model.config, kv_dtype, block_size=8, layout=layout)
    driver = ModelDriver(model, pool, range(20, 40))
    driver.logits({"a": TOKENS[:13]})
    everything = np.arange(pool.num_blocks, dtype=np.int32)

    def contents() -> npt.NDArray[Any]:
        """[num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]"""
        return np.stack([pool.gather(everything, layer) for layer in range(pool.shape.num_layers)])

    before = contents()
    batch = driver.batch({"a": TOKENS[13:18], "b": TOKENS[:4]})
    abandoned = model.begin(batch, pool)
    first = model.logits(abandoned)
    assert np.array_equal(contents(), before)
    step = model.begin(batch, pool)
    assert np.array_equal(model.logits(step), first)
    model.commit(step)
    changed = (contents() != before).any(axis=(0, 2, 3, 5))  # [num_blocks, block_size]
    assert np.flatnonzero(changed.ravel()).tolist() == sorted(batch.slot_mapping.tolist())


def test_a_step_without_samples_commits_its_rows(tmp_path: Path, model: Model, alone: dict[str, list[Any]]) -> None:
    pool = make_pool(tmp_path, model.config)
    driver = ModelDriver(model, pool, range(1, 20))
    batch = driver.batch({"a": TOKENS[:-1]})
    object.__setattr__(batch, "sample_rows", np.empty(0, np.int32))
    object.__setattr__(batch, "sampling", [])
    step = model.begin(batch, pool)
    assert len(model.forward(step).token_ids) == 0
    model.commit(step)
    driver.lengths["a"] = LENGTH - 1
    assert np.array_equal(driver.logits({"a": TOKENS[-1:]})["a"], alone["f32"][-1])


def test_a_step_never_copies_the_pool(tmp_path: Path, model: Model) -> None:
    blocks_in_a_gib = (1 << 30) // make_pool(tmp_path, model.config).shape.stride_bytes
    pool = make_pool(tmp_path, model.config, num_blocks=blocks_in_a_gib)  # sparse on disk
    driver = ModelDriver(model, pool, [blocks_in_a_gib - 1, blocks_in_a_gib // 2, 0])
    driver.sample({"a": TOKENS[:20]})
    tracemalloc.start()
    mx.reset_peak_memory()
    for token in TOKENS[20:28]:
        driver.sample({"a": [token]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + mx.get_peak_memory() < 64 << 20


@pytest.mark.parametrize(("dtype", "bits"), [("f32", 0), ("bf16", 0), ("f16", 0), ("f32", 4), ("bf16", 8)])
def test_a_row_of_a_product_has_the_same_bits_alone(tmp_path: Path, dtype: str, bits: int) -> None:
    config = TinyConfig(vocab_size=1500, hidden_size=320, num_hidden_layers=1, dtype=dtype, bits=bits, head_dim=32)
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, config, seed=2))
    tensors: LinearTensors = checkpoint.linear("lm_head", 1500, 320)
    linear = Linear(tensors, mx.float32)
    rows = mx.array(np.random.default_rng(1).standard_normal((37, 320)).astype(np.float32))
    together = np.asarray(linear(rows))
    for index in (0, 1, 17, 36):
        assert np.array_equal(np.asarray(linear(rows[index : index + 1]))[0], together[index])
        assert np.array_equal(np.asarray(linear(rows[index:]))[0], together[index])


def test_it_says_what_it_computes() -> None:
    ops = MlxOps()
    assert ops.backend == "mlx"
    assert ops.batch_invariant
    assert ops.numerics_id.startswith("mlx-")
    assert ops.numerics_id == MlxOps().numerics_id
