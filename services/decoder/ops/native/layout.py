"""The structs of src/kernels.h, src/layers.h and src/forward.h, field for field."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p

FORMAT_F32, FORMAT_F16, FORMAT_BF16, FORMAT_Q4, FORMAT_Q8, FORMAT_I8 = range(6)
OP_EMBED, OP_NORM_QKV_ROPE, OP_ATTENTION, OP_OUT_PROJ, OP_MLP = range(5)

MAX_COLS = 32768
MAX_HEAD_DIM = 512


class Matrix(ctypes.Structure):
    """`matrix`: a linear layer as the checkpoint has it."""

    _fields_ = [
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("out_bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_bytes", c_int64),
        ("scale_row_bytes", c_int64),
        ("format", c_int32),
        ("scale_format", c_int32),
        ("group_size", c_int32),
        ("reserved", c_int32),
    ]


class AttentionLayer(ctypes.Structure):
    """`attention_layer`."""

    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("hidden_size", c_int64),
        ("window", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("input_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rope_inv_freq", c_void_p),
        ("rope_factor", c_double),
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
    ]


class MoeLayer(ctypes.Structure):
    """`moe_layer`: a mixture of experts, or a dense MLP."""

    _fields_ = [
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_experts", c_int64),
        ("experts_per_token", c_int64),
        ("renormalise", c_int32),
        ("dense", c_int32),
        ("eps", c_float),
        ("reserved", c_int32),
        ("norm", c_void_p),
        ("router", Matrix),
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
    ]


class HeadLayer(ctypes.Structure):
    """`head_layer`."""

    _fields_ = [("norm", c_void_p), ("eps", c_float), ("reserved", c_int32), ("head", Matrix)]


class Step(ctypes.Structure):
    """`step`."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("cu_seqlens", c_void_p),
        ("context_lens", c_void_p),
        ("blocks", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("layer_stride", c_int64),
        ("value_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("row_bytes", c_int64),
        ("rows_offset", c_int64),
        ("kv_format", c_int32),
        ("reserved", c_int32),
        ("num_layers", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("own_rows", c_void_p),
        ("own_scales", c_void_p),
        ("commit_blocks", c_void_p),
        ("commit_offsets", c_void_p),
    ]


class RecordedOp(ctypes.Structure):
    """`recorded_op`."""

    _fields_ = [("code", c_int32), ("layer", c_int32), ("handle", c_void_p)]


class SampleRow(ctypes.Structure):
    """`sample_row`: how one token is drawn, and what came of it."""

    _fields_ = [
        ("logits", c_void_p),
        ("raw", c_void_p),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("noise", c_double),
        ("top_k", c_int64),
        ("alternatives", c_void_p),
        ("num_alternatives", c_int32),
        ("token_id", c_int32),
        ("raw_largest", c_double),
        ("raw_mass", c_double),
    ]
