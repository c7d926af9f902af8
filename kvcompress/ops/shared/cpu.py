"""The CPU kernels on records of form `shared`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.ops import library
from kvcompress.ops.interface.common import LEVELS, MAX_HEAD_DIM, MAX_LATENT_CHANNELS
from kvcompress.ops.interface.shared import AttendArgs, StoreArgs
from kvcompress.ops.rows import rows_struct
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.records import records_array, records_struct
from kvcompress.ops.shared.reference import SharedOp
from kvcompress.ops.sides import record_struct


def covers(codec: SharedCodec) -> bool:
    """Whether the kernels know this layer's shape and codes."""
    head_dim, ranks = codec.spec.head_dim, (codec.k.decode_HRD.shape[1], codec.v.decode_HRD.shape[1])
    known = head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0 and max(ranks) <= MAX_LATENT_CHANNELS
    sides = (codec.spec.k, codec.spec.v)
    return known and all(side.unpacked_by("cpu") and not side.outliers for side in sides)


class CpuShared(SharedOp):
    """Storing and attending by compiled code; many queries of a request are torch's, which expands keys once."""

    split_tokens = 512
    """Tokens one thread attends at a time, a multiple of 64: few, because keys are expanded and all heads are one piece
    of work."""
    expand_queries = 256
    """From this many queries of a request on, its keys and values are expanded once for all of them, in torch.

    The kernels expand keys once per 64 rows of queries; torch does it once, but with values, and scores take it longer.
    """

    def __init__(self, compiled: ctypes.CDLL, codec: SharedCodec) -> None:
        super().__init__(codec)
        self._compiled = compiled

    def store(
        self, records_NHSX: Tensor, spec: SideSpec, latent_THR: Tensor, weight_HR: Tensor, slots_T: Tensor
    ) -> None:
        if spec.rank > MAX_HEAD_DIM:
            super().store(records_NHSX, spec, latent_THR, weight_HR, slots_T)
            return
        assert latent_THR.dtype == torch.float32
        assert latent_THR.shape == (slots_T.shape[0], records_NHSX.shape[1], spec.rank)
        slots_T, weight_HR = slots_T.to(torch.int64).contiguous(), weight_HR.float().contiguous()
        args = StoreArgs(
            records=records_struct(records_NHSX, record_struct(spec)),
            latents=rows_struct(latent_THR),
            weight_HR=weight_HR,
            slots=slots_T,
            num_tokens=slots_T.shape[0],
            run=library.run(),
        )
        library.check(self._compiled.kvc_shared_store(ctypes.byref(args)))

    def attend(self, call: SharedCall) -> None:
        call = call.on("cpu")
        # Rows that are stored after all are torch's, too.
        most = self.expand_queries if bool((call.exact_rows >= 0).all()) else 0
        for run, on_kernels in call.runs(lambda queries: queries < most):
            (self._attend if on_kernels else super().attend)(run)

    def _attend(self, call: SharedCall) -> None:
        plan, codec = self.plan, self.plan.codec
        codes, scale = None, None
        if codec.rope is not None and library.level() >= LEVELS.index("avx512vnni"):
            codes, scale = plan.k_codes_blocked or (None, None)
        own = codec.rope is None
        batch, exact = call.structs()
        args = AttendArgs(
            k=records_array(call.k_records, call.k_tables, plan.k_struct),
            v=records_array(call.v_records, call.v_tables, plan.v_struct),
            num_k=len(call.k_records),
            num_stripes=len(call.v_records),
            query=rows_struct(call.query_THD),
            output=rows_struct(call.output_THD),
            exact=exact,
            k_mean_HD=codec.k.mean_HD,
            k_decode_HDR=plan.k_decode_HDR if own else None,
            k_decode_blocked=None if own or codes is not None else plan.k_decode_blocked,
            k_codes_blocked=codes,
            k_scale_HD=scale,
            v_decode_HRD=codec.v.decode_HRD,
            v_mean_HD=codec.v.mean_HD,
            rope_frequency_F=None if codec.rope is None else codec.rope.frequency_F,
            rope_amplitude=plan.amplitude,
            batch=batch,
            num_kv_heads=codec.k.mean_HD.shape[0],
            head_dim=codec.k.mean_HD.shape[1],
            run=library.run(self.split_tokens),
        )
        library.check(self._compiled.kvc_shared_attend(ctypes.byref(args)))
