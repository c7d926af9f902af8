"""The C interface of forms other than per-head pages (csrc/include/kvcompress/cpu.h)."""

from __future__ import annotations

import ctypes

from kvcompress.ops.library import Rows, Side


class LatentPages(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class LatentAttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", LatentPages),
        ("query", Rows),
        ("output", Rows),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class LatentAppendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", LatentPages),
        ("keys", Rows),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("level", ctypes.c_int32),
    )


class Records(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("records", ctypes.c_int32),
        ("token_bytes", ctypes.c_int32),
        ("side", Side),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
    )


class SharedAttendArgs(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.POINTER(Records)),
        ("v", ctypes.POINTER(Records)),
        ("num_k", ctypes.c_int32),
        ("num_stripes", ctypes.c_int32),
        ("query", Rows),
        ("output", Rows),
        ("keys", Rows),
        ("values", Rows),
        ("k_mean_HD", ctypes.c_void_p),
        ("k_decode_HDR", ctypes.c_void_p),
        ("k_decode_blocked", ctypes.c_void_p),
        ("k_codes_blocked", ctypes.c_void_p),
        ("k_scale_HD", ctypes.c_void_p),
        ("v_decode_HRD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("rope_frequency_F", ctypes.c_void_p),
        ("rope_amplitude", ctypes.c_float),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("stored_lens", ctypes.c_void_p),
        ("exact_rows", ctypes.c_void_p),
        ("exact_starts", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class StoreArgs(ctypes.Structure):
    _fields_ = (
        ("records", Records),
        ("latents", Rows),
        ("weight_HR", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )
