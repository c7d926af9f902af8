"""What a step stores where the cache has the form `blocks`: the blocks it completes, and its newest tokens in rings.

`seal` comes before attention and `keep` after it: the newest tokens take the places of older ones that attention reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.ops.blocks import cuda as cuda_blocks
from kvcompress.ops.blocks.plan import BlocksPlan
from kvcompress.ops.blocks.reference import newest
from kvcompress.ops.rows import host_list, int32_rows


def seal(
    pages_NHMB: Tensor,
    rings_NHXPD: Tensor,
    ring_R: Tensor,
    plan: BlocksPlan,
    keys_THD: Tensor,
    values_THD: Tensor,
    block_table_RN: Tensor,
    query_starts: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
) -> None:
    """Compress every block that is complete by the step's end and was not before it; arguments as in `blocks.attend`.

    On any device by torch, all blocks of the step at once. Which blocks they are must be known here: starts and lengths
    on the host keep a GPU from being waited for.
    """
    block, per_page, device = plan.spec.block, pages_NHMB.shape[2], pages_NHMB.device
    found: list[tuple[Tensor, Tensor]] = []
    pages, places = [], []
    spans = pairwise(host_list(query_starts))
    for request, ((start, stop), length) in enumerate(zip(spans, host_list(seq_lens), strict=True)):
        first, last = (length - (stop - start)) // block, length // block
        if first == last:
            continue
        ring_1 = ring_R[request : request + 1]
        tokens = (keys_THD[start:stop], values_THD[start:stop])
        exact_THD, _ = newest(rings_NHXPD, ring_1, *tokens, length, block)
        keys, values = (side[: (last - first) * block] for side in exact_THD)
        found.append((keys, values))
        number = torch.arange(first, last, device=device)
        pages.append(block_table_RN[request].long()[number // per_page])
        places.append(number % per_page)
    if found:
        keys, values = (torch.cat(side) for side in zip(*found, strict=True))
        pages_NHMB[torch.cat(pages), :, torch.cat(places)] = plan.codec.seal(keys, values)


def keep(
    rings_NHXPD: Tensor,
    ring_R: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    query_starts: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
) -> None:
    """Put each request's last tokens, as many as fit, into its ring; arguments as in `blocks.attend`."""
    on_device = cuda_blocks.keeping_library_for(rings_NHXPD, keys_THD, values_THD)
    device = keys_THD.device if on_device is not None else "cpu"
    starts_R, lengths_R = (int32_rows(numbers, device) for numbers in (query_starts, seq_lens))
    if on_device is not None:
        rings = (rings_NHXPD, int32_rows(ring_R, device))
        cuda_blocks.keep(on_device, *rings, keys_THD, values_THD, starts_R, lengths_R)
        return
    device, places = keys_THD.device, rings_NHXPD.shape[3]
    request_T = torch.repeat_interleave(starts_R.diff())
    # Tokens of the request after each one, itself included.
    left_T = starts_R[1:][request_T] - torch.arange(request_T.shape[0])
    place_T = (lengths_R[request_T] - left_T) % places
    kept_T = (left_T <= places).nonzero().flatten().to(device)
    ring_T, place_T = ring_R[request_T.to(device)].long()[kept_T], place_T.to(device)[kept_T]
    rings_NHXPD[ring_T, :, 0, place_T] = keys_THD[kept_T]
    rings_NHXPD[ring_T, :, 1, place_T] = values_THD[kept_T]
