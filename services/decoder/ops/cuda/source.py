"""The text of the kernels for one geometry, as `mx.fast.cuda_kernel` takes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

WARPS_PER_BLOCK = 16
THREADS_PER_BLOCK = 32 * WARPS_PER_BLOCK
SMALL_ROWS = 32  # rows of a small step: SMALL_ROWS in common.cuh
UNIT = 64  # inputs of a tile: UNIT in common.cuh

FAST_FILES = (
    "common",
    "geometry",
    "linear",
    "dense_small",
    "moe_small",
    "attention",
    "dense_large",
    "moe_large",
    "attention_large",
    "sample",
    "step",
)
PLAIN_FILES = ("common", "sample", "plain", "plain_attention", "plain_step")

# MLX declares its kernels without bounds, and the compiler would give a thread more registers than 512 of them can have.
_LAUNCH_BOUNDS = (
    "#undef __global__\n"
    f"#define __global__ __attribute__((global)) __attribute__((launch_bounds({THREADS_PER_BLOCK}, 1)))\n"
)

SMALL_BODY = "    lh::run_step<false>(lh::fetch_table(table), done);\n"
LARGE_BODY = "    lh::run_step<true>(lh::fetch_table(table), done);\n"
COMMIT_BODY = (
    "    lh::commit_rows(*reinterpret_cast<const lh::Table*>(table));\n"
    "    if (blockIdx.x + threadIdx.x == 0) done[0] = previous[0];\n"
)
ROWS_BODY = (
    "    const lh::Table& t = *reinterpret_cast<const lh::Table*>(table);\n"
    "    const lh::u64 count = lh::u64(lh::step_of(t, t.launches[0] - 1).sample_rows) * lh::VOCAB;\n"
    "    for (lh::u64 i = blockIdx.x * lh::THREADS + threadIdx.x; i < count; i += gridDim.x * lh::THREADS)\n"
    "        done[i] = t.logits[i];\n"
)


PLAIN_BODY = "    lh::run_plain(*reinterpret_cast<const lh::PlainTable*>(table), done);\n"
PLAIN_COMMIT_BODY = (
    "    lh::plain_commit(*reinterpret_cast<const lh::PlainTable*>(table));\n"
    "    if (blockIdx.x + threadIdx.x == 0) done[0] = previous[0];\n"
)
PLAIN_ROWS_BODY = (
    "    const lh::PlainTable& t = *reinterpret_cast<const lh::PlainTable*>(table);\n"
    "    const lh::u64 count = lh::u64(lh::plain_step_of(t, t.launches[0] - 1).sample_rows) * t.vocab;\n"
    "    for (lh::u64 i = blockIdx.x * lh::THREADS + threadIdx.x; i < count; i += gridDim.x * lh::THREADS)\n"
    "        done[i] = t.logits[i];\n"
)


@dataclass(frozen=True)
class Geometry:
    """What the kernels are compiled for."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    window_tokens: int
    rms_norm_eps: float
    attention_scale: float
    rope_attention_factor: float
    # Widths of the weights in each place: the sum of those of 4, 8 and 16 bits that the checkpoint has there.
    attention_widths: int
    router_widths: int
    expert_widths: int
    head_widths: int
    wide_scales: bool  # scales of the quantisation are float32 pairs, not bf16 pairs

    def problem(self) -> str | None:
        """Why the kernels do not take this geometry; None when they do."""
        group = self.num_heads // self.num_kv_heads
        checks = {
            "head_dim must be 64 or 128": self.head_dim in (64, 128),
            "at most 8 query heads share a K/V head": group <= 8 and self.num_heads % self.num_kv_heads == 0,
            "hidden_size must be a multiple of 64": self.hidden_size % UNIT == 0,
            "moe_intermediate_size must be a multiple of 64": self.moe_intermediate_size % UNIT == 0,
            "the heads must be a multiple of 64 wide": self.num_heads * self.head_dim % UNIT == 0,
            "at most 256 experts": self.num_experts <= 256,
            "at most 8 experts for each token": self.num_experts_per_tok <= 8,
        }
        return next((words for words, holds in checks.items() if not holds), None)


def shared_bytes(geometry: Geometry) -> int:
    """Shared memory of a block of the step's kernel, at least what its parts declare."""
    table = 8 * (29 + 25 * geometry.num_layers) + 128
    small = 8192 + geometry.num_experts * (2 * SMALL_ROWS + 8)
    splits = -(-geometry.moe_intermediate_size // UNIT // 8)
    parts = 32768 + max(32768, SMALL_ROWS * geometry.num_experts_per_tok * splits * 64)
    attention = 2 * 8 * 32 * geometry.head_dim * 2 + 2048
    window = (4 * 32 * 2 + 32 * 8 * 4) * geometry.head_dim + 16384
    stages = 3 * 64 * 256 + 16 * 8 * 512 + 512
    arriving = 16 * (4096 + 8 * 16 * (8 if geometry.wide_scales else 4))
    return -(-(table + small + max(arriving + parts, attention, window, stages)) // 128) * 128


def kernel_text(files: tuple[str, ...]) -> str:
    """Some kernel files, one after the other."""
    folder = resources.files(__package__) / "kernels"
    return "".join((folder / f"{name}.cuh").read_text(encoding="utf-8") for name in files)


def kernel_revision(files: tuple[str, ...]) -> str:
    """Eight digits that change whenever the kernels' text does."""
    return hashlib.blake2b(kernel_text(files).encode(), digest_size=4).hexdigest()


def plain_header() -> str:
    """Everything before a plain kernel's own function; the same for every model."""
    return kernel_text(PLAIN_FILES) + _LAUNCH_BOUNDS


def header(geometry: Geometry) -> str:
    """Everything before the kernel's own function."""
    defines = {
        "LAYERS": geometry.num_layers,
        "HIDDEN": geometry.hidden_size,
        "HEADS": geometry.num_heads,
        "KV_HEADS": geometry.num_kv_heads,
        "HEAD_DIM": geometry.head_dim,
        "VOCAB": geometry.vocab_size,
        "EXPERTS": geometry.num_experts,
        "TOPK": geometry.num_experts_per_tok,
        "INTER": geometry.moe_intermediate_size,
        "NORM_TOPK": int(geometry.norm_topk_prob),
        "WINDOW": geometry.window_tokens,
        "EPS": repr(geometry.rms_norm_eps),
        "SCALE": repr(geometry.attention_scale),
        "ROPE_FACTOR": repr(geometry.rope_attention_factor),
        "ATTENTION_WIDTHS": geometry.attention_widths,
        "ROUTER_WIDTHS": geometry.router_widths,
        "EXPERT_WIDTHS": geometry.expert_widths,
        "HEAD_WIDTHS": geometry.head_widths,
        "WIDE_SCALES": int(geometry.wide_scales),
        "SHARED_BYTES": shared_bytes(geometry),
    }
    lines = "".join(f"#define LH_{name} {value}\n" for name, value in defines.items())
    return lines + kernel_text(FAST_FILES) + _LAUNCH_BOUNDS
