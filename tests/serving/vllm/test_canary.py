"""The start-up canary lets sound layers pass and names the layer, and the path, of every planted fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import require

require.need("vllm")

from kvcompress.codec import canary as stated
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.rope import Rope
from kvcompress.ops import library
from kvcompress.ops.shared.call import SharedCall
from kvcompress.serving.vllm import canary, canary_paths
from kvcompress.serving.vllm.canary_reference import Inputs
from kvcompress.serving.vllm.served import Served
from tests.serving.vllm import canary_layers

BLOCK, NUM_BLOCKS = canary_layers.BLOCK, canary_layers.NUM_BLOCKS


@pytest.fixture(params=["torch", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    else:
        require.need("kernels")


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    canary_layers.without_an_engine(monkeypatch)


def check(members: list[Served], inputs: list[Inputs]) -> None:
    for member, given in zip(members, inputs, strict=True):
        canary.check_inputs(member, given)
    canary.check_codecs(members, inputs)
    canary.check_paths(None, members, inputs)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.float32) for form in canary_layers.FORMS), ("heads", torch.bfloat16), ("shared", torch.float16)],
)
@pytest.mark.usefixtures("kernels")
def test_sound_layers_pass_and_the_cache_is_left_as_it_was(form: str, dtype: torch.dtype) -> None:
    members, inputs = canary_layers.make(form)
    before = [member.layer.cache.clone() for member in members]
    check(members, [Inputs(*(x.to(dtype) for x in given)) for given in inputs])
    assert all(torch.equal(member.layer.cache, old) for member, old in zip(members, before, strict=True))


# What a codec file can have wrong while its hashes agree. Statement and inputs are those of the right codec.


def side_fault(change: Callable[[SideCodec], dict[str, Tensor]]) -> Callable[[HeadsCodec], HeadsCodec]:
    def planted(codec: HeadsCodec) -> HeadsCodec:
        return HeadsCodec(codec.k, replace(codec.v, **change(codec.v)))

    return planted


def in_head_1(x: Tensor, factor: Tensor | float) -> Tensor:
    changed = x.clone()
    changed[1] *= factor
    return changed


def four_channels(rank: int, channel: int, value: float) -> Tensor:
    factor_R = torch.ones(rank)
    factor_R[channel : channel + 4] = value
    return factor_R


FAULTS: dict[str, Callable[[SideCodec], dict[str, Tensor]]] = {
    "scale of the first channels too small": lambda v: {
        "scale_HR": in_head_1(v.scale_HR, four_channels(32, 0, 1 / 64))
    },
    "scales in the wrong order": lambda v: {"scale_HR": v.scale_HR[:, torch.arange(31, -1, -1)].contiguous()},
    "inverse scaled": lambda v: {"inverse_HRD": in_head_1(v.inverse_HRD, 1.5)},
    "sign of some basis vectors": lambda v: {"basis_HDR": in_head_1(v.basis_HDR, four_channels(32, 20, -1.0))},
    "gain beyond what sixteen bits hold": lambda v: {"scale_HR": in_head_1(v.scale_HR, 1e-7)},
    "mean of another layer": lambda v: {"mean_HD": in_head_1(v.mean_HD, -5.0)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_codec_that_is_not_what_it_states_is_named(fault: str) -> None:
    members, inputs = canary_layers.make("heads")
    wrong = replace(members[0], codec=side_fault(FAULTS[fault])(members[0].codec))  # type: ignore[arg-type]
    wrong.layer.impl.use_codec(wrong.codec, torch.device("cpu"), 512)
    with pytest.raises(ValueError, match=r"stops the server: layer 0 \(layers.0.attn\) loses .* of its values in KV"):
        canary.check_codecs([wrong], inputs)
    canary.check_paths(None, [wrong], inputs)  # the path does what this codec says; only the statement knows better


@pytest.mark.parametrize("form", ["heads", "blocks", "shared", "shared values"])
def test_swapped_codecs_are_named(form: str) -> None:
    """Each layer with another one's tensors: here, codecs on another seed's activations."""
    members, _ = canary_layers.make(form)
    other = [canary_layers.activations(seed + 50) for seed in range(len(members))]
    with pytest.raises(ValueError, match=r"layer 0 .* loses .* in KV head 0 where its codec states"):
        canary.check_codecs(members, other)


def test_a_codec_that_states_nothing_may_not_lose_more_than_all() -> None:
    members, inputs = canary_layers.make("heads", stated=False)
    check(members, inputs)
    codec: Any = members[0].codec
    negative = HeadsCodec(codec.k, replace(codec.v, inverse_HRD=-codec.v.inverse_HRD, mean_HD=-codec.v.mean_HD))
    with pytest.raises(ValueError, match="loses"):
        canary.check_codecs([replace(members[0], codec=negative)], inputs)


# What the engine can compute otherwise than the model that was compressed.


def rotated(given: Inputs, theta: float) -> Inputs:
    """Keys as another rotary base gives them."""
    half = canary_layers.HEAD_DIM // 2
    positions_T = torch.arange(given.key_THD.shape[0])
    ropes = [Rope(base ** -(torch.arange(half) / half), torch.ones(1)) for base in (1e4, theta)]
    return given._replace(key_THD=ropes[1].rotate(ropes[0].unrotate(given.key_THD, positions_T), positions_T))


def test_wrong_rotary_positions_are_named() -> None:
    [served], [given] = canary_layers.make("heads")
    canary.check_inputs(served, rotated(given, 1e4))
    shifted = given._replace(key_THD=given.key_THD.roll(1, 0))
    for wrong in (rotated(given, 2e4), shifted):
        with pytest.raises(ValueError, match=r"layer 0 .* computes other keys than its codec was made for .*positions"):
            canary.check_inputs(served, wrong)


def test_activations_that_are_not_finite_are_named() -> None:
    [served], [given] = canary_layers.make("latent")
    given.value_THD[3, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="computes values that are not finite"):
        canary.check_inputs(served, given)


# What the served path can do wrong.


def faulty(served: Served, condition: Callable[[Any], bool], change: Callable[[Any, Tensor], Any]) -> None:
    """Steps that meet a condition are run on changed metadata."""
    stock = served.layer.impl.forward

    def forward(layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, batch: Any, out: Tensor) -> Any:
        return stock(layer, query, key, value, cache, change(batch, cache) if condition(batch) else batch, out)

    served.layer.impl.forward = forward


def begins_at(batch: Any) -> int:
    return int(batch.seq_lens[0]) - batch.num_actual_tokens


def wrong_table(batch: Any, cache: Tensor) -> Any:
    return replace(batch, block_table=batch.block_table.roll(1, 1))


def lost_prefix(batch: Any, cache: Tensor) -> Any:
    table = batch.block_table.clone()
    table[0, 0] = 0
    return replace(batch, block_table=table)


PATH_FAULTS = {
    "decode": (lambda batch: batch.num_actual_tokens == 1, wrong_table),
    "prefix hit": (lambda batch: begins_at(batch) == BLOCK, lost_prefix),
    "chunked prefill": (lambda batch: begins_at(batch) == 7, wrong_table),
}


@pytest.mark.parametrize("path", PATH_FAULTS)
@pytest.mark.parametrize("form", ["heads", "blocks", "latent"])
def test_a_fault_on_one_path_is_named_with_it(path: str, form: str) -> None:
    members, inputs = canary_layers.make(form)
    faulty(members[0], *PATH_FAULTS[path])
    with pytest.raises(
        ValueError, match=rf"layer 0 \(layers.0.attn\), {path}: attention from compressed pages differs"
    ):
        check(members, inputs)


def test_one_layer_of_a_group_that_reads_the_wrong_pages_is_named() -> None:
    members, inputs = canary_layers.make("shared")
    op = members[1].layer.impl.op
    stock = op.attend

    def attend(call: SharedCall) -> None:
        flipped = [table_RN.flip(1) for table_RN in call.v_tables]
        stock(replace(call, k_tables=flipped, v_tables=flipped))

    op.attend = attend
    with pytest.raises(ValueError, match=r"layer 1 \(layers.1.attn\), (decode|prefix hit|chunked prefill): "):
        check(members, inputs)


@pytest.mark.usefixtures("kernels")
def test_kernels_with_a_tensor_of_another_codec_are_named() -> None:
    [served], inputs = canary_layers.make("heads")
    codec: Any = served.codec
    served.layer.impl.use_codec(
        HeadsCodec(codec.k, replace(codec.v, inverse_HRD=-codec.v.inverse_HRD)), torch.device("cpu"), 512
    )
    with pytest.raises(ValueError, match=r"layer 0 \(layers.0.attn\), prefill: attention .* differs by \d+"):
        check([served], inputs)


@pytest.mark.usefixtures("kernels")
def test_answers_from_spoiled_pages_are_named() -> None:
    [served], inputs = canary_layers.make("heads")

    def spoil(batch: Any, cache: Tensor) -> Any:
        cache.fill_(0xFF)  # gains that are not numbers
        return batch

    faulty(served, lambda batch: batch.num_actual_tokens == 1, spoil)
    with pytest.raises(ValueError, match=r"layer 0 .*, decode: attention from compressed pages differs by"):
        check([served], inputs)


def test_paths_use_the_last_blocks_and_never_the_engines_own() -> None:
    for num_blocks in range(3, 40):
        for block_size in (16, 32, 128):
            found = canary_paths.paths(num_blocks, block_size)
            used = {block for path in found for block in path.blocks}
            assert {path.ring for path in found} == {num_blocks - 1}
            assert 0 < min(used) <= max(used) < num_blocks - 1
            assert ("prefix hit" in [path.name for path in found]) == (num_blocks >= 5)
            for path in found:
                assert len(set(path.blocks)) == len(path.blocks) >= -(-path.steps[-1][1] // block_size)


def test_a_prefix_hit_reads_what_another_request_wrote() -> None:
    found = {path.name: path for path in canary_paths.paths(NUM_BLOCKS, BLOCK)}
    hit, prefill = found["prefix hit"], found["prefill"]
    assert hit.blocks[0] == prefill.blocks[0]
    assert not set(hit.blocks[1:]) & set(prefill.blocks)
    assert hit.steps[0][0] == BLOCK


def test_layers_that_share_their_memory_get_blocks_apart() -> None:
    """As in hybrid models, where layers differ in their block tables only."""
    members, inputs = canary_layers.make("shared")
    for member in members[1:]:
        member.layer.module.kv_cache = members[0].layer.cache
    check(members, inputs)
    lanes = [canary_paths.paths(NUM_BLOCKS, BLOCK, lane, 3) for lane in range(3)]
    used = [{block for path in paths for block in (*path.blocks, path.ring)} for paths in lanes]
    assert sum(map(len, used)) == len(set.union(*used))
    assert 0 not in set.union(*used)


def test_a_cache_without_room_is_said_to_have_none(caplog: pytest.LogCaptureFixture) -> None:
    members, inputs = canary_layers.make("heads")
    members[0].layer.module.kv_cache = members[0].layer.cache[:2]
    canary.compat.logger.addHandler(caplog.handler)
    try:
        canary.check_paths(None, members, inputs)
    finally:
        canary.compat.logger.removeHandler(caplog.handler)
    assert "a cache of 2 blocks has no room" in caplog.text


def test_a_statement_survives_its_file() -> None:
    members, _ = canary_layers.make("shared")
    made = stated.ModelStatement([1, 2, 3], [members[0].stated, None])
    read = stated.ModelStatement.from_json(made.to_json())
    assert read.tokens == made.tokens
    assert read.layers[1] is None
    assert read.layers[0] is not None
    for side, original in members[0].stated.items():  # type: ignore[union-attr]
        torch.testing.assert_close(read.layers[0][side].error_H, original.error_H, rtol=1e-5, atol=0)
        torch.testing.assert_close(read.layers[0][side].sketch_HP, original.sketch_HP, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="statement cannot be read"):
        stated.ModelStatement.from_json({"tokens": [1], "layers": [{"k": {}}]})
