"""The C interface of the CPU kernels (csrc/include/kvcompress/cpu.h): the structs that they are handed."""

from __future__ import annotations

import ctypes

MAX_BANDS = 4
MAX_HEAD_DIM = 512
MAX_LOW_RANK = 32
MAX_LATENT_CHANNELS = 4096


class Side(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("num_bands", ctypes.c_int32),
        ("outliers", ctypes.c_int32),
        ("bits", ctypes.c_int32 * MAX_BANDS),
        ("widths", ctypes.c_int32 * MAX_BANDS),
        ("steps", ctypes.c_float * MAX_BANDS),
        ("gain_offset", ctypes.c_int64),
        ("outlier_offset", ctypes.c_int64),
        ("channel_offset", ctypes.c_int64),
        ("code_offset", ctypes.c_int64),
        ("code_bytes", ctypes.c_int64),
    )


class Pages(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("k", Side),
        ("v", Side),
    )


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", Pages),
        ("query", Rows),
        ("output", Rows),
        ("lse_TH", ctypes.c_void_p),
        ("k_decode_HDR", ctypes.c_void_p),
        ("k_mean_HD", ctypes.c_void_p),
        ("v_decode_HRD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class AppendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", Pages),
        ("keys", Rows),
        ("values", Rows),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("k_mean_HD", ctypes.c_void_p),
        ("k_encode_HDR", ctypes.c_void_p),
        ("k_weight_HR", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("v_encode_HDR", ctypes.c_void_p),
        ("v_weight_HR", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class BlockSide(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("low_rank", ctypes.c_int32),
        ("outliers", ctypes.c_int32),
        ("nbytes", ctypes.c_int32),
        ("code_offset", ctypes.c_int64),
        ("scale_offset", ctypes.c_int64),
        ("zero_offset", ctypes.c_int64),
        ("token_offset", ctypes.c_int64),
        ("channel_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("place_offset", ctypes.c_int64),
    )


class BlockPages(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("record_bytes", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("k", BlockSide),
        ("v", BlockSide),
    )


class Rings(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_rings", ctypes.c_int64),
        ("ring_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("places", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class BlockAttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", BlockPages),
        ("rings", Rings),
        ("query", Rows),
        ("keys", Rows),
        ("values", Rows),
        ("output", Rows),
        ("lse_TH", ctypes.c_void_p),
        ("k_decode_HDR", ctypes.c_void_p),
        ("k_mean_HD", ctypes.c_void_p),
        ("v_decode_HRD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("ring_of", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


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
