"""The C interface as Python says it: what is written for C, and structs that point into tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kvcompress.ops.interface import header
from kvcompress.ops.interface.common import CPU_CODE_BITS, Rows, Run
from kvcompress.ops.interface.shared import AttendArgs, Records


@pytest.mark.parametrize("room", header.ROOMS)
def test_headers_are_as_they_would_be_written_now(room: str) -> None:
    written = header.path(room).read_text()
    assert written == header.header(room), "write them again with python -m kvcompress.ops.interface.header"


def test_what_a_header_says() -> None:
    text = header.header("shared")
    assert "static_assert(sizeof(kvc_shared_attend_args) ==" in text  # where compiler and ctypes must agree
    assert "    const kvc_shared_records* v;  // num_stripes\n" in text
    assert "KVC_EXPORT int32_t kvc_shared_attend(const kvc_shared_attend_args* args);" in text
    codes = " ".join(f"X({bits})" for bits in CPU_CODE_BITS)
    assert f"#define KVC_CPU_CODE_BITS(X) {codes}\n" in header.header("common")


def test_a_struct_keeps_the_tensors_it_points_into() -> None:
    scores = torch.ones(4)
    alive, address = weakref.ref(scores), scores.data_ptr()
    args = AttendArgs(run=Run(workspace=scores), query=Rows(scores, 1, 2, 0))
    del scores
    gc.collect()
    assert alive() is not None
    assert (args.run.workspace, args.query.data) == (address, address)
    assert (args.query.token_stride, args.query.head_stride, args.num_k, args.k_mean_HD) == (1, 2, 0, None)
    del args
    gc.collect()
    assert alive() is None


def test_a_field_takes_no_tensor_of_other_numbers() -> None:
    with pytest.raises(AssertionError):
        Records(data=torch.zeros(1))
    with pytest.raises(AssertionError):
        Records().filled(block_table=torch.zeros(1, dtype=torch.int64))
