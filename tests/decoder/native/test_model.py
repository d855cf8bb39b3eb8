"""Whole models on the native backend: tokens as mlx-lm's, logits as NumPy's, and bits that depend on one's own tokens only."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.decoder.errors import EngineFailedError
from services.decoder.kv_view import KvView, PagedKv
from services.decoder.models import Model
from services.decoder.ops.native import NativeOps
from services.decoder.request import SamplingParams
from services.decoder.sampler import RowSampling, sample_rows
from tests.decoder.model_driver import ModelDriver, generate_greedy, load, make_contiguous, make_pool
from tests.decoder.native.steps import Array
from tests.decoder.numpy_reference import NumpyQwen3Moe
from tests.decoder.tiny_models import TinyConfig, random_tiny_config, write_tiny_checkpoint

NUM_TOKENS = 64
NUM_PROMPTS = 16
# As in tests/decoder/test_parity.py: 24 random configurations, every third float32, 4-bit, 8-bit.
MATRIX = [(seed, (0, 4, 8)[seed % 3]) for seed in range(24)]
QUICK = MATRIX[:6]

CONFIGS = {
    "f32": TinyConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=24, num_experts_per_tok=3),
    "4bit": TinyConfig(bits=4, head_dim=32, mlp_only_layers=(1,), tie_word_embeddings=True, dtype="bf16"),
    "8bit": TinyConfig(
        bits=8, group_size=64, hidden_size=128, head_dim=32, moe_intermediate_size=64, intermediate_size=128
    ),
}
LENGTH = 150
TOKENS: list[int] = np.random.default_rng(3).integers(0, 96, LENGTH).tolist()


@pytest.mark.parametrize(
    ("seed", "bits"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in MATRIX]
)
def test_exact_greedy_tokens_equal_those_of_mlx_lm(tmp_path: Path, seed: int, bits: int) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    rng = np.random.default_rng(2000 + seed)
    config = random_tiny_config(rng, bits)
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed)
    model = load(directory, NativeOps("exact", 2))
    prompts = {
        f"seq-{index}": rng.integers(0, config.vocab_size, int(rng.integers(1, 40))).tolist()
        for index in range(NUM_PROMPTS)
    }
    pool = make_pool(tmp_path, model.config, "f32", num_blocks=NUM_PROMPTS * 7 + 1)
    driver = ModelDriver(model, pool, rng.permutation(np.arange(1, pool.num_blocks)).tolist())
    outputs = generate_greedy(driver, prompts, NUM_TOKENS, rng)
    reference, _ = load_model(directory)
    for name, prompt in prompts.items():
        cache, tokens, expected = make_prompt_cache(reference), mx.array([prompt]), []
        for _ in range(NUM_TOKENS):
            expected.append(int(mx.argmax(reference(tokens, cache=cache)[0, -1]).item()))
            tokens = mx.array([expected[-1:]])
        assert outputs[name] == expected, (config, name)


@pytest.mark.parametrize(
    "config",
    [
        TinyConfig(layout="separate", num_files=2),
        TinyConfig(layout="fused", tie_word_embeddings=True, norm_topk_prob=False),
        TinyConfig(
            attention_bias=True, mlp_only_layers=(1,), head_dim=24, num_attention_heads=6, num_key_value_heads=3
        ),
        TinyConfig(bits=4, head_dim=32, bits_of={"mlp.gate": 8, "embed_tokens": 8, "k_proj": 8}),
        TinyConfig(bits=8, head_dim=32, decoder_sparse_step=2, num_experts=5, num_experts_per_tok=5),
        TinyConfig(extra={"use_sliding_window": True, "sliding_window": 7}),
        TinyConfig(dtype="f16", layout="separate"),
    ],
    ids=lambda config: f"{config.layout}-{config.dtype}-{config.bits}bit",
)
def test_logits_agree_with_numpy(tmp_path: Path, config: TinyConfig) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", config, seed=5)
    tokens = np.random.default_rng(6).integers(0, config.vocab_size, 90).tolist()
    expected = NumpyQwen3Moe(directory).logits(tokens)

    def error(precision: str) -> float:
        model = load(directory, NativeOps(precision, 2))
        driver = ModelDriver(model, make_pool(tmp_path, model.config, "f32"), range(1, 20))
        found = np.stack([driver.logits({"a": [token]})["a"] for token in tokens])
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    assert error("exact") <= 1e-4
    assert (
        error("fast") <= 0.2
    )  # a router's near tie may choose otherwise; the demo model's test measures what it costs


@functools.cache
def _model(config: str, precision: str) -> Model:
    directory = Path(tempfile.mkdtemp(prefix="native-model-"))
    return load(write_tiny_checkpoint(directory, CONFIGS[config], seed=11), NativeOps(precision, 2))


@functools.cache
def _alone(config: str, precision: str, kv_dtype: str) -> list[Array]:
    """The logits after each of TOKENS, fed one at a time to a sequence that is alone."""
    model = _model(config, precision)
    driver = ModelDriver(model, make_pool(Path(tempfile.mkdtemp()), model.config, kv_dtype), range(1, 20))
    return [driver.logits({"a": [token]})["a"] for token in TOKENS]


def _chunks(rng: np.random.Generator, max_chunk: int) -> Iterator[list[int]]:
    start = 0
    while start < LENGTH:
        size = int(rng.integers(1, max_chunk + 1))
        yield TOKENS[start : start + size]
        start += size


def _same_as_alone(driver: ModelDriver, chunks: list[list[int]], expected: list[Array]) -> None:
    end = 0
    for chunk in chunks:
        end += len(chunk)
        assert np.array_equal(driver.logits({"a": chunk})["a"], expected[end - 1]), end


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16", "int8"])
def test_s13_bits_depend_on_neither_block_size_nor_layout_nor_chunks(
    tmp_path: Path, config: str, precision: str, kv_dtype: str
) -> None:
    model, expected = _model(config, precision), _alone(config, precision, kv_dtype)
    for block_size, layout in ((8, "hnd"), (8, "nhd"), (16, "nhd"), (32, "hnd"), (0, "hnd"), (0, "nhd")):
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
            _same_as_alone(ModelDriver(model, kv, blocks), chunks, expected)


@pytest.mark.parametrize(
    ("config", "precision", "kv_dtype"),
    [*((config, precision, "bf16") for config in CONFIGS for precision in ("exact", "fast")), ("4bit", "fast", "int8")],
)
def test_bits_are_the_same_among_31_others_and_with_any_number_of_threads(
    tmp_path: Path, config: str, precision: str, kv_dtype: str
) -> None:
    expected = _alone(config, precision, kv_dtype)
    directory = write_tiny_checkpoint(tmp_path / "model", CONFIGS[config], seed=11)
    for threads in (1, 2, 5):
        rng = np.random.default_rng(threads)
        model = load(directory, NativeOps(precision, threads))
        pool = make_pool(tmp_path, model.config, kv_dtype, num_blocks=900)
        driver, end = ModelDriver(model, pool, rng.permutation(900).tolist()), 0
        for chunk in _chunks(rng, 40):
            end += len(chunk)
            others = {f"other-{i}": rng.integers(0, 96, int(rng.choice([1, 1, 1, 7]))).tolist() for i in range(31)}
            names = rng.permutation(["a", *others]).tolist()
            logits = driver.logits({name: chunk if name == "a" else others[name] for name in names})
            assert np.array_equal(logits["a"], expected[end - 1]), end


@pytest.mark.parametrize(("kv_dtype", "layout"), [("bf16", "hnd"), ("int8", "nhd")])
def test_s27_padding_is_never_read_and_block_0_is_a_real_block(tmp_path: Path, kv_dtype: str, layout: str) -> None:
    model, expected = _model("4bit", "fast"), _alone("4bit", "fast", kv_dtype)
    pool = make_pool(tmp_path, model.config, kv_dtype, layout=layout)
    for block_id in range(pool.num_blocks):
        pool.block_bytes(block_id)[...] = 0xFF  # NaN, in others' blocks and behind one's own rows
    chunks = list(_chunks(np.random.default_rng(5), 20))
    for padding, blocks in ((0, [*range(1, 20)]), (-(2**31), [*range(20, 40)]), (63, [*range(40, 60), 0])):
        _same_as_alone(ModelDriver(model, pool, blocks, table_padding=padding), chunks, expected)


@pytest.mark.parametrize(("kv_dtype", "layout"), [("bf16", "hnd"), ("bf16", "nhd"), ("int8", "hnd"), ("int8", "nhd")])
def test_a_step_writes_at_commit_only_and_only_its_slots(tmp_path: Path, kv_dtype: str, layout: str) -> None:
    model = _model("4bit", "fast")
    pool = make_pool(tmp_path, model.config, kv_dtype, block_size=8, layout=layout)
    driver = ModelDriver(model, pool, range(20, 40))
    driver.logits({"a": TOKENS[:13]})
    before = _contents(pool)
    batch = driver.batch({"a": TOKENS[13:18], "b": TOKENS[:4]})
    first = model.logits(model.begin(batch, pool))
    assert all(np.array_equal(now, then) for now, then in zip(_contents(pool), before, strict=True))
    step = model.begin(batch, pool)
    assert np.array_equal(model.logits(step), first)
    model.commit(step)
    for now, then in zip(_contents(pool), before, strict=True):
        changed = (now != then).any(axis=(1, 2, 3))
        assert np.flatnonzero(changed.ravel()).tolist() == sorted(batch.slot_mapping.tolist())


def _contents(pool: PagedKv) -> list[Array]:
    """Elements [num_blocks, num_layers, 2, num_kv_heads * head_dim, block_size], and scales likewise where there are some."""
    blocks = np.stack([pool.block(block_id) for block_id in range(pool.num_blocks)])
    parts = [np.moveaxis(blocks, -1, -2).reshape(*blocks.shape[:3], -1, blocks.shape[4])]
    if pool.kv_dtype == "int8":
        parts.append(np.stack([pool.scales(block_id) for block_id in range(pool.num_blocks)]))
    return parts


def test_s1_buffers_grow_only_when_needed(tmp_path: Path) -> None:
    ops = NativeOps("fast", 2)
    model = load(write_tiny_checkpoint(tmp_path / "model", CONFIGS["4bit"], seed=11), ops)
    driver = ModelDriver(model, make_pool(tmp_path, model.config, "bf16"), range(1, 60))
    driver.logits({"a": TOKENS[:100]})
    largest = [buffer.nbytes for buffer in ops._spare_rows]
    for token in TOKENS[100:110]:
        driver.logits({"a": [token]})
    assert [buffer.nbytes for buffer in ops._spare_rows] == largest


def test_sampling_agrees_with_the_common_sampler(tmp_path: Path) -> None:
    model = _model("4bit", "exact")
    driver = ModelDriver(model, make_pool(tmp_path, model.config), range(1, 60))
    batch = driver.batch({name: TOKENS[i : i + 5] for i, name in enumerate("abcdefg")})
    kinds = [
        RowSampling(SamplingParams(), 0, 0, None),
        RowSampling(SamplingParams(), 0, 0, 0),
        RowSampling(SamplingParams(), 0, 0, 3),
        RowSampling(SamplingParams(temperature=0.9, top_k=20, seed=5), 0, 7, None),
        RowSampling(SamplingParams(temperature=1.0, top_p=0.8, seed=6), 1, 7, 2),
        RowSampling(SamplingParams(presence_penalty=1.5), 0, 0, 0, output_counts={3: 2}),
        RowSampling(SamplingParams(), 0, 0, None, banned_token_ids=frozenset(range(50))),
    ]
    object.__setattr__(batch, "sampling", kinds)
    logits = model.logits(model.begin(batch, driver.kv))
    expected, found = sample_rows(logits, kinds), model.forward(model.begin(batch, driver.kv))
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert list(found.top) == list(expected.top)
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or abs(ours - theirs) < 1e-5


def test_logits_that_are_not_finite_fail_the_step(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model", CONFIGS["f32"], seed=11)
    model = load(directory, NativeOps("exact", 2))
    driver = ModelDriver(model, make_pool(tmp_path, model.config), range(1, 20))
    driver.logits({"a": TOKENS[:5]})
    driver.kv.block(driver.tables["a"][0])[...] = np.nan
    with pytest.raises(EngineFailedError, match="not finite"):
        driver.sample({"a": TOKENS[5:6]})


def test_it_says_what_it_computes() -> None:
    assert NativeOps("fast").backend == "native"
    assert NativeOps("fast").batch_invariant
    assert NativeOps("fast").numerics_id != NativeOps("exact").numerics_id
    assert NativeOps("fast", 1).numerics_id == NativeOps("fast", 3).numerics_id
    assert NativeOps("fast", isa="plain").numerics_id.split("-")[2] == "plain"
    with pytest.raises(ValueError, match="precision"):
        NativeOps("quick")
    with pytest.raises(OSError, match="no native kernels 'sse9'"):
        NativeOps(isa="sse9")
