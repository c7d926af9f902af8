"""The CUDA kernels on records of form `shared`.

Keys are expanded and scored by one kernel, latents of values mixed by another, and expanded here; tokens of the running
step, which are attended as they are, are a third one's, and both parts are merged here. Nothing waits for the device or
reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.interface.shared import CUDA_MAX_STRIPES, CUDA_MAX_TILES, CudaAttendArgs, StoreArgs
from kvcompress.ops.rows import rows_struct
from kvcompress.ops.shared import fragments
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.plan import SharedPlan
from kvcompress.ops.shared.records import records_array, records_struct
from kvcompress.ops.shared.reference import SharedOp
from kvcompress.ops.sides import merged_bands, record_struct

MAX_TOKEN_BYTES = 1024
"""Of a record: what kernels hold of wider ones has no room in the shared memory of the smallest GPU, 99 KiB."""

SCORE_BYTES = 256 * 2**20
"""Scores lie in memory between the kernels: of so many requests at a time, of one at least."""

_LEAST_TOKENS = {"score": 1024, "mix": 1024}
"""Tokens of a split, so that its beginning, and of mixed values the merge, cost little."""

_BLOCKS = {"score": 2, "mix": 8}
"""Blocks of threads per multiprocessor that splits are to make."""


def covers(codec: SharedCodec) -> bool:
    """Whether the kernels attend layers like this one."""
    spec = codec.spec
    shape = fragments.covers(spec.head_dim) and len(spec.group) <= CUDA_MAX_STRIPES
    return shape and _known(spec.k) and _known(spec.v)


def _known(side: SideSpec) -> bool:
    bands = merged_bands(side)
    tiles = sum(fragments.padded(*band) for band in bands) // fragments.TILE
    small = tiles <= CUDA_MAX_TILES and side.bytes_per_token <= MAX_TOKEN_BYTES
    return side.unpacked_by("cuda") and small and not side.outliers


def _aligned(records_NHSX: Tensor) -> bool:
    return records_NHSX.data_ptr() % 16 == 0 and records_NHSX.stride(0) % 16 == 0 and records_NHSX.shape[2] % 16 == 0


class CudaShared(SharedOp):
    """Storing and attending a few queries per request by kernels; prompts are torch's."""

    on_kernels = True

    def __init__(self, kernels: ctypes.CDLL, codec: SharedCodec) -> None:
        super().__init__(codec)
        self._kernels = kernels
        # Now, because the first call may be one that a CUDA graph captures.
        _ = self.plan.k_absorb_HDP if codec.rope is None else self.plan.k_fragments

    def store(
        self, records_NHSX: Tensor, spec: SideSpec, latent_THR: Tensor, weight_HR: Tensor, slots_T: Tensor
    ) -> None:
        """A slot outside the cache is skipped."""
        assert latent_THR.dtype == torch.float32
        assert _aligned(records_NHSX)
        assert latent_THR.stride(-1) == 1
        weight_HR, slots_T = weight_HR.float().contiguous(), slots_T.to(torch.int64).contiguous()
        args = StoreArgs(
            records=records_struct(records_NHSX, record_struct(spec)),
            latents=rows_struct(latent_THR),
            weight_HR=weight_HR,
            slots=slots_T,
            num_tokens=slots_T.shape[0],
            run=gpu.run(latent_THR.device, slots_T.shape[0]),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_shared_store(ctypes.byref(args)))

    def attend(self, call: SharedCall) -> None:
        assert all(_aligned(records) for records in (*call.k_records, *call.v_records))
        device = call.query_THD.device
        if call.query_starts.device == device and call.most_queries <= gpu.MOST_QUERIES:
            self.attend_few(call.on(device))
            return
        for run, on_kernels in call.on("cpu").runs(lambda queries: queries <= gpu.MOST_QUERIES):
            if on_kernels:
                self.attend_few(run.alone().on(device))
            else:
                super().attend(run)

    def attend_few(
        self, call: SharedCall, splits: tuple[int, int] | None = None, score_bytes: int = SCORE_BYTES
    ) -> None:
        """With everything on the device.

        Args:
            splits: parts that a request's tokens are cut into, for scores and for values; chosen from shapes alone if
                not given.
        """
        query_THD, max_query_len = call.query_THD, call.most_queries
        plan, codec = self.plan, self.plan.codec
        tokens, heads, head_dim = query_THD.shape
        requests, kv_heads = call.seq_lens.shape[0], codec.k.mean_HD.shape[0]
        # Zeros, because padding behind the last request is not written.
        mixed_THR = query_THD.new_zeros(tokens, heads, codec.v.decode_HRD.shape[1], dtype=torch.float32)
        exact_THD = query_THD.new_zeros(tokens, heads, head_dim, dtype=torch.float32)
        mixed_lse_TH, exact_lse_TH = query_THD.new_zeros(2, tokens, heads, dtype=torch.float32)
        if tokens and requests:
            sides = zip((*call.k_records, *call.v_records), (*call.k_tables, *call.v_tables), strict=True)
            context = min(records.shape[2] * table.shape[1] for records, table in sides)
            stride = -(-context // 64) * 64
            at_once = max(1, min(requests, score_bytes // (4 * max_query_len * heads * stride)))
            scores = query_THD.new_empty(at_once * max_query_len * heads * stride, dtype=torch.float32)
            if splits is None:
                score_blocks = at_once * kv_heads * -(-max_query_len * heads // (128 * kv_heads))
                mix_blocks = at_once * plan.stripes * -(-max_query_len * heads // 32)
                splits = (
                    _splits("score", score_blocks, context, query_THD),
                    _splits("mix", mix_blocks, context, query_THD),
                )
            batch, exact = call.structs()
            args = CudaAttendArgs(
                k=records_array(call.k_records, call.k_tables, plan.k_struct),
                v=records_array(call.v_records, call.v_tables, plan.v_struct),
                num_k=len(call.k_records),
                num_stripes=len(call.v_records),
                exact=exact,
                scores=scores,
                score_stride=stride,
                mixed_THR=mixed_THR,
                mixed_lse_TH=mixed_lse_TH,
                exact_THD=exact_THD,
                exact_lse_TH=exact_lse_TH,
                batch=batch,
                requests_at_once=at_once,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                score_splits=splits[0],
                run=gpu.run(query_THD.device, tokens, heads, max_query_len, splits[1], mixed_THR.shape[2]),
                **_described_keys(plan, query_THD),
            )
            cuda_library.check(self._kernels, self._kernels.kvc_cuda_shared_attend(ctypes.byref(args)))
        mixed_THGR = mixed_THR.unflatten(1, (kv_heads, -1))
        stored_THGD = torch.einsum("thgr,hrd->thgd", mixed_THGR, codec.v.decode_HRD) + codec.v.mean_HD[:, None, :]
        share_TH1 = torch.sigmoid(mixed_lse_TH - exact_lse_TH)[..., None]
        call.output_THD.copy_(torch.lerp(exact_THD, stored_THGD.flatten(1, 2), share_TH1))

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int) -> int:
        codec = self.plan.codec
        head_dim, rank = codec.spec.head_dim, codec.v.decode_HRD.shape[1]
        # Mixed latents, once more in the order that a product wants; exact parts and outputs, before and after their
        # mean and merged; queries absorbed. Splits, of which there are no more than rows keep the device busy.
        row = 2 * rank + 6 * head_dim + codec.k.decode_HRD.shape[1]
        splits = _BLOCKS["mix"] * gpu.multiprocessors(codec.k.mean_HD.device) * 32 * (rank + 1)
        kernels = SCORE_BYTES + (tokens * num_heads * row + splits) * torch.float32.itemsize
        return max(super().workspace_bytes(tokens, num_heads, longest), kernels)


def _described_keys(plan: SharedPlan, query_THD: Tensor) -> dict[str, object]:
    """What the kernels need of queries and decoders."""
    codec = plan.codec
    if codec.rope is None:
        grouped_THGD = query_THD.float().unflatten(1, (codec.k.mean_HD.shape[0], -1))
        absorbed_THP = torch.einsum("thgd,hdp->thgp", grouped_THGD, plan.k_absorb_HDP).flatten(1, 2).contiguous()
        return {"query": rows_struct(absorbed_THP), "k_channels": absorbed_THP.shape[2]}
    keys = plan.k_fragments
    return {
        "query": rows_struct(query_THD),
        "k_channels": keys.width,
        "k_decode": keys.decode,
        "k_decode_unit": keys.unit_H,
        "k_mean": keys.mean_HW,
        "rope_frequency": keys.frequency_F,
        "rope_amplitude": keys.amplitude_1,
    }


def _splits(what: str, blocks: int, context: int, query_THD: Tensor) -> int:
    wanted = -(-_BLOCKS[what] * gpu.multiprocessors(query_THD.device) // blocks)
    return max(1, min(wanted, context // _LEAST_TOKENS[what]))
