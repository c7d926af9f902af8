"""The C interface of the CUDA kernels of layers that share a latent (csrc/include/kvcompress/cuda_shared.h)."""

from __future__ import annotations

import ctypes

from kvcompress.ops import interface


class SharedAttendArgs(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.POINTER(interface.Records)),
        ("v", ctypes.POINTER(interface.Records)),
        ("num_k", ctypes.c_int32),
        ("num_stripes", ctypes.c_int32),
        ("query", interface.Rows),
        ("keys", interface.Rows),
        ("values", interface.Rows),
        ("k_channels", ctypes.c_int32),
        ("k_decode", ctypes.c_void_p),
        ("k_decode_unit", ctypes.c_void_p),
        ("k_mean", ctypes.c_void_p),
        ("rope_frequency", ctypes.c_void_p),
        ("rope_amplitude", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("score_stride", ctypes.c_int64),
        ("mixed_THR", ctypes.c_void_p),
        ("mixed_lse_TH", ctypes.c_void_p),
        ("exact_THD", ctypes.c_void_p),
        ("exact_lse_TH", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("stored_lens", ctypes.c_void_p),
        ("exact_rows", ctypes.c_void_p),
        ("exact_starts", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_requests", ctypes.c_int32),
        ("requests_at_once", ctypes.c_int32),
        ("max_query_len", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("score_splits", ctypes.c_int32),
        ("mix_splits", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    )


class StoreArgs(ctypes.Structure):
    _fields_ = (
        ("records", interface.Records),
        ("latents", interface.Rows),
        ("weight_HR", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )
