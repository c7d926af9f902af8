"""Form `blocks` under transformers: complete blocks as bytes, the newest, incomplete block as it is.

What a token is attended as depends on the query's position (`codec.blocks`): within one forward call an early query may
see a block exactly and a late one see it compressed. So the layer hands attention both kinds of rows, compressed ones
first, and an attention function of ours, which `prepare` selects, shows each query its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.codec.blocks.attention import visible_rows
from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.serving.transformers.layer import CompressedLayer

ATTENTION = "kvcompress"
"""Name of the attention function among transformers' own."""

_ROWS = "kvcompress_rows"


@dataclass(frozen=True)
class _Rows:
    """What the rows of a key tensor are: `sealed` compressed tokens, then exact ones from position `exact_start`."""

    sealed: int
    exact_start: int
    block: int


class BlocksLayer(CompressedLayer):
    """`keys` and `values` are the open block's, exact; `records` is
    `uint8 [batch, blocks, heads, record_bytes]`.
    """

    codec: BlocksCodec
    is_croppable = False
    prepared = False

    def kept(self) -> list[Tensor]:
        return [self.keys, self.values, self.records]

    def prepare(self, model: PreTrainedModel) -> None:
        """The model keeps working with every other cache: rows that no such layer made go to PyTorch's attention."""
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        self.prepared = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        batch, spec = key_states.shape[0], self.codec.spec
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.records = torch.empty(
            batch, 0, spec.num_kv_heads, spec.record_bytes, dtype=torch.uint8, device=self.device
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append post-RoPE states `[batch, heads, tokens, head_dim]`; return the rows attention needs.

        Raises:
            ValueError: some of the queries see a block exactly and others see it compressed, and the model has not
                been prepared.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        block, before = self.codec.spec.block, self.get_seq_length()
        length = before + key_states.shape[-2]
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        whole = keys.shape[-2] // block * block
        if whole:
            sealed = [
                self.codec.seal(key.transpose(0, 1), value.transpose(0, 1))
                for key, value in zip(keys[:, :, :whole], values[:, :, :whole], strict=True)
            ]
            self.records = torch.cat([self.records, torch.stack(sealed)], 1)
        self.keys, self.values = keys[:, :, whole:].clone(), values[:, :, whole:].clone()
        # The first query sees everything before this position in compressed form, and the others see more.
        exact_start = (before + 1) // block * block
        rows = _Rows(self.records.shape[1] * block, exact_start, block)
        exact = min(keys.shape[-2], length - exact_start)
        if rows.sealed + exact > length and not self.prepared:
            raise ValueError(
                "a prompt longer than the codec's block needs the model to be prepared; call "
                "kvcompress.serving.transformers.prepare(model, cache) before"
            )
        return self._rows(0, keys, exact, rows), self._rows(1, values, exact, rows)

    def _rows(self, side: int, exact_states: Tensor, exact: int, rows: _Rows) -> Tensor:
        # [batch, blocks, heads, block, head_dim] to [batch, heads, tokens, head_dim]
        codec = (self.codec.k, self.codec.v)[side]
        start = (0, self.codec.k.spec.nbytes)[side]
        records = self.records[..., start : start + codec.spec.nbytes]
        states = codec.reconstruct(records.flatten(0, 1)).unflatten(0, records.shape[:2])
        sealed = states.transpose(1, 2).flatten(2, 3).to(self.dtype)
        found = torch.cat([sealed, exact_states[:, :, exact_states.shape[-2] - exact :]], -2)
        setattr(found, _ROWS, rows)
        return found

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return int(self.records.shape[1] * self.codec.spec.block + self.keys.shape[-2])

    def crop(self, tokens_to_remove: int) -> None:
        """Only tokens of the open block can be taken back."""
        remove = self.get_seq_length() - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if remove <= 0:
            return
        if remove > self.keys.shape[-2]:
            raise ValueError(f"cannot take back {remove} tokens: {self.keys.shape[-2]} are not compressed yet")
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def _each(self, change: Any) -> None:
        self.keys, self.values, self.records = (change(tensor) for tensor in (self.keys, self.values, self.records))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; `query` is `[batch, query heads, tokens, head_dim]`."""
    rows: _Rows | None = getattr(key, _ROWS, None)
    if rows is None:
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return output, None
    queries, exact = query.shape[2], key.shape[2] - rows.sealed
    end = rows.exact_start + exact
    position_Q = torch.arange(end - queries, end, device=query.device)
    sees = visible_rows(position_Q, rows.sealed, rows.exact_start, exact, rows.block)
    mask = torch.cat(sees, -1)[None, None]
    if attention_mask is not None:
        # Padding is known by position; a compressed row has one, too.
        assert attention_mask.dtype == torch.bool
        assert attention_mask.shape[-1] == end
        mask = mask & torch.cat([attention_mask[..., : rows.sealed], attention_mask[..., rows.exact_start :]], -1)
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=options["scaling"], enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
