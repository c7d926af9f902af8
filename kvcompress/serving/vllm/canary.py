"""The start-up canary: before the first request, a known prompt goes through the model and must bring no surprise.

Three questions, layer by layer, each answered with the layer's name if the answer is no:

1. Are these the keys and values that the codec was made for? (Weights, rotary positions: the statement's sketches.)
2. Does the codec lose what it said it would lose, and no more? (Bases, scales, gains: the statement's errors.)
3. Does the served path give what the codec and exact attention give, however a token comes to be attended?

The prompt runs with exact attention in place of every layer's own, so that each layer is judged on the model's real
activations and a fault in one does not reach the next. Then each layer's own implementation is fed with them, in
blocks of the real cache that nobody uses yet. No rank waits for another in between, so a refusal hangs nobody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec import canary as stated
from kvcompress.codec.contract import CacheCodec
from kvcompress.ops import cuda_library, library
from kvcompress.serving.vllm import canary_paths, canary_reference, compat
from kvcompress.serving.vllm.canary_reference import Inputs
from kvcompress.serving.vllm.metadata import Step
from kvcompress.serving.vllm.served import Served

PATH_TOLERANCE = 0.02
"""Relative difference of a path's answers: rounding to half precision takes 0.4 %, and a latent that rounding moves
across a quantizer's threshold is one of thousands.
"""

SKETCH_TOLERANCE = 0.25
"""Relative difference of sketches: rounding to half precision adds up to a few per cent over a deep model's layers."""

ERROR_FACTOR, ERROR_FLOOR = 1.2, 0.003
"""How much more than stated a codec may lose: as a factor, and as a share of the whole where it loses little."""


def run(runner: Any, engine: compat.Engine, layers: Sequence[Served], tokens: Sequence[int]) -> None:
    """Let the canary sing. Collective over all ranks.

    Args:
        runner: vLLM's model runner.
        layers: in the model's order, groups complete.
        tokens: the prompt.

    Raises:
        ValueError: naming the first layer that fails, how, and on which path.
    """
    begun = time.perf_counter()
    seen = witness(runner, engine, tokens)
    for members in _groups(layers):
        for member in members:
            check_inputs(member, seen[member.layer.name])
        check_codecs(members, [seen[member.layer.name] for member in members])
        check_paths(engine, members, [seen[member.layer.name] for member in members])
    took = time.perf_counter() - begun
    compat.logger.info("kvcompress: start-up canary passed in %d layers, %.1f s", len(layers), took)


def witness(runner: Any, engine: compat.Engine, tokens: Sequence[int]) -> dict[str, Inputs]:
    """What the attention layers are given when the prompt runs with exact attention, by the layers' names."""
    layers = compat.attention_layers(engine)
    seen: dict[str, Inputs] = {}

    def exactly(layer: compat.Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen[layer.name] = Inputs(query.clone(), key.clone(), value.clone())
        return _attend(layer, query, key, value)

    with compat.answered_by(layers, exactly):
        compat.run_model(runner, engine, torch.tensor(tokens, device=layers[0].device))
    return seen


def check_inputs(served: Served, inputs: Inputs) -> None:
    """Question 1."""
    for side, x_THD in (("k", inputs.key_THD), ("v", inputs.value_THD)):
        what = "keys" if side == "k" else "values"
        if not bool(torch.isfinite(x_THD).all()):
            raise _refusal(f"{served.name} computes {what} that are not finite; the weights are damaged")
        if served.stated is None:
            continue
        difference = stated.sketch_difference(x_THD, served.stated[side].sketch_HP)
        if not difference <= SKETCH_TOLERANCE:
            raise _refusal(
                f"{served.name} computes other {what} than its codec was made for (they differ by {difference:.0%}): "
                "weights or rotary positions are not those of the compressed model"
            )


def check_codecs(members: Sequence[Served], inputs: Sequence[Inputs]) -> None:
    """Question 2, for layers that are decoded together."""
    read = canary_reference.rows(_on_device(members), inputs)
    for member, given, rows in zip(members, inputs, read, strict=True):
        for number, (side, x_THD) in enumerate((("k", given.key_THD), ("v", given.value_THD))):
            found_H = stated.relative_error(x_THD, rows.stored[number])
            # Storing nothing would lose everything; what states nothing may at least not be worse.
            expected_H = torch.ones_like(found_H) if member.stated is None else member.stated[side].error_H
            # Written so that what is not a number fails.
            wrong_H = ~(found_H <= ERROR_FACTOR * expected_H + ERROR_FLOOR)
            if bool(wrong_H.any()):
                head = int(wrong_H.float().argmax())
                raise _refusal(
                    f"{member.name} loses {found_H[head]:.1%} of its {'keys' if side == 'k' else 'values'} in KV head "
                    f"{head} where its codec states {expected_H[head]:.1%}: the codec's tensors are not this layer's"
                )


def check_paths(engine: compat.Engine, members: Sequence[Served], inputs: Sequence[Inputs]) -> None:
    """Question 3, for layers that are decoded together. Leaves the cache as it was."""
    cache = members[0].layer.cache
    block_size, device = cache.shape[2], cache.device
    lanes = _lanes(members)
    paths = [canary_paths.paths(cache.shape[0], block_size, lane, max(lanes) + 1) for lane in lanes]
    if not paths[0]:
        compat.logger.warning("kvcompress: a cache of %d blocks has no room for the canary's paths", cache.shape[0])
        return
    longest = max(stop for path in paths[0] for _, stop in path.steps)
    inputs = [Inputs(*(canary_paths.stretched(x_THD, longest) for x_THD in given)) for given in inputs]
    expected = canary_reference.rows(_on_device(members), inputs)
    used = sorted({block for of_layer in paths for path in of_layer for block in (*path.blocks, path.ring)})
    caches = _caches(members)
    before = [tensor[used].clone() for tensor in caches]
    try:
        for same in zip(*paths, strict=True):
            lost, total = [0.0] * len(members), [0.0] * len(members)
            entries = [0] * len(members)
            for start, stop in same[0].steps:
                steps = [canary_paths.metadata(path, (start, stop), block_size, device) for path in same]
                answers = answers_to(engine, members, inputs, steps, canary_paths.ring_metadata(same[0], device), start)
                for place, (member, answer_QHD) in enumerate(zip(members, answers, strict=True)):
                    query_QHD, scale = inputs[place].query_THD[start:stop], member.layer.scale
                    right_QHD = canary_reference.answer(member.codec, expected[place], query_QHD, start, scale)
                    lost[place] += float((answer_QHD.float() - right_QHD).square().sum())
                    total[place] += float(right_QHD.square().sum())
                    entries[place] += right_QHD.numel()
            for member, error, energy, count in zip(members, lost, total, entries, strict=True):
                difference = (error / max(energy, stated.SMALLEST**2 * count)) ** 0.5
                if not difference <= PATH_TOLERANCE:
                    raise _refusal(
                        f"{member.name}, {same[0].name}: attention from compressed pages differs by {difference:.1%} "
                        f"from reference attention (tolerance {PATH_TOLERANCE:.0%}); do not trust this installation's "
                        f"kernels with this model; {_switch(member)}= (empty) serves with torch code instead"
                    )
    finally:
        for tensor, content in zip(caches, before, strict=True):
            tensor[used] = content


def answers_to(
    engine: compat.Engine,
    members: Sequence[Served],
    inputs: Sequence[Inputs],
    steps: Sequence[Step],
    ring: Step,
    start: int,
) -> list[Tensor]:
    """What the layers' own implementations answer to one step, which each sees with its own blocks."""
    metadata: dict[str, Any] = {}
    for member, step in zip(members, steps, strict=True):
        metadata[member.layer.name] = step
        if member.ring is not None:
            metadata[member.ring.name] = ring
    tokens = steps[0].num_actual_tokens
    rows, answers = slice(start, start + tokens), []
    with torch.inference_mode(), compat.running(engine, metadata, tokens):
        for member, given, step in zip(members, inputs, steps, strict=True):
            query, key, value = (x_THD[rows].contiguous() for x_THD in given)
            output = torch.full((*query.shape[:2], value.shape[2]), torch.nan, dtype=query.dtype, device=query.device)
            member.layer.impl.forward(member.layer.module, query, key, value, member.layer.cache, step, output)
            answers.append(output)
    return answers


def _attend(layer: compat.Layer, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor) -> Tensor:
    """One whole text, causally."""
    tokens = query_THD.shape[0]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_THD.device).tril()
    if layer.sliding_window is not None:
        mask = mask.triu(1 - layer.sliding_window)
    query_HTD, key_HTD, value_HTD = (x_THD.transpose(0, 1).float() for x_THD in (query_THD, key_THD, value_THD))
    mixed_HTD = torch.nn.functional.scaled_dot_product_attention(
        query_HTD, key_HTD, value_HTD, attn_mask=mask, scale=layer.scale, enable_gqa=True
    )
    return mixed_HTD.transpose(0, 1)


def _groups(layers: Sequence[Served]) -> list[list[Served]]:
    """Layers that are decoded together, by their first one."""
    found: dict[tuple[int, ...], list[Served]] = {}
    for served in layers:
        found.setdefault(served.group, []).append(served)
    return list(found.values())


def _lanes(members: Sequence[Served]) -> list[int]:
    """For every layer how many of those before it have the same memory: in hybrid models layers of different block
    tables share their blocks.
    """
    starts = [member.layer.cache.data_ptr() for member in members]
    return [starts[:place].count(start) for place, start in enumerate(starts)]


def _on_device(members: Sequence[Served]) -> list[CacheCodec]:
    return [member.codec.to(member.layer.cache.device) for member in members]


def _caches(members: Sequence[Served]) -> list[Tensor]:
    rings = [member.ring.kv_cache for member in members if member.ring is not None]
    return [*(member.layer.cache for member in members), *rings]


def _switch(served: Served) -> str:
    """The environment variable that turns off the kernels which attend a layer."""
    return cuda_library.PATH_VARIABLE if served.layer.cache.device.type == "cuda" else library.PATH_VARIABLE


def _refusal(reason: str) -> ValueError:
    return ValueError(f"the start-up canary stops the server: {reason}")
