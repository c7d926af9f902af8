"""Every method with every feature of vLLM: it works, or the server says why not. Writes docs/support-matrix.md.

A test of each name in `features.FEATURES`; its docstring says what it sees. Tests of one method share their engines.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.serving.loading import load_codec
from tests import require
from tests.e2e.support_matrix import bench, pressed, table
from tests.e2e.support_matrix.case import BLOCK, ELASTIC, FEW, LENGTHS, SHORT, Case
from tests.e2e.support_matrix.collect import PROPERTY
from tests.e2e.support_matrix.features import CELLS, FEATURES, REFUSED
from tests.e2e.support_matrix.methods import METHODS

require.need("vllm")
pytestmark = pytest.mark.e2e

TOLERANCE = 0.02
"""In log-probability of a whole answer: a latent may fall on the other side of a quantizer's threshold (reference)."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    feature = metafunc.function.__name__.removeprefix("test_")
    if feature == "refused":
        metafunc.parametrize(("case", "feature"), sorted(REFUSED), indirect=["case"])
    elif feature in FEATURES:
        methods = [method for method in METHODS if (method, feature) not in REFUSED]
        metafunc.parametrize("case", methods, indirect=True)


@pytest.fixture(scope="module")
def make_case(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("matrix")
    return functools.cache(lambda method: Case(method, base_model, folder / method))


@pytest.fixture
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    return make_case(request.param)


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    feature = request.function.__name__.removeprefix("test_")
    if feature in FEATURES:
        record_property(PROPERTY, (request.getfixturevalue("case").name, feature, table.YES))


def test_prefix_caching(case: Case) -> None:
    """in a second pass, whole blocks of a prompt come from the cache, and the tokens are the same."""
    cached = case.pressed["cached"]
    assert cached[0] == [0] * len(LENGTHS)
    longest = [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    assert all(0 <= hit <= most and hit % BLOCK == 0 for hit, most in zip(cached[1], longest, strict=True))
    assert sum(cached[1]) > 0
    assert case.pressed["metrics"]["vllm:prefix_cache_hits"] >= sum(cached[1])


def test_chunked_prefill(case: Case) -> None:
    """steps of at most 24 tokens end inside prompts and inside blocks; the tokens are the same."""
    assert case.pressed["chunks"] > sum(LENGTHS) // 24


def test_mixed_batches(case: Case) -> None:
    """steps in which some requests are fed their prompt and others decode; the tokens are the same."""
    assert case.pressed["mixed"] > 0


def test_preemption(case: Case) -> None:
    """a pool too small: requests lose their blocks and are computed again; the tokens are the same."""
    assert case.pressed["metrics"]["vllm:num_preemptions"] > 0


def test_ngram_drafts(case: Case) -> None:
    """some drafts of three tokens are accepted and some rejected; the tokens are the same."""
    counters = case.pressed["metrics"]
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafted


def test_parallel_sampling(case: Case) -> None:
    """three sampled answers to one prompt differ, and have the log-probabilities that the transformers path gives."""
    _check_scores(case, case.pressed["samples"], pressed.SAMPLES)


def test_beam_search(case: Case) -> None:
    """beams come in order, and have the log-probabilities that the transformers path gives."""
    beams = case.pressed["beams"]
    _check_scores(case, beams, pressed.BEAMS)
    assert beams[0][1] > beams[1][1]


def _check_scores(case: Case, answers: list[tuple[list[int], float]], count: int) -> None:
    tokens = [answer for answer, _ in answers]
    assert len({tuple(answer) for answer in tokens}) == count
    assert [len(answer) for answer in tokens] == [pressed.SHORT] * count
    assert [score for _, score in answers] == pytest.approx(case.score(tokens), abs=TOLERANCE)


def test_openai_server(case: Case) -> None:
    """`/v1/completions` answers with the transformers path's tokens, and with text."""
    assert case.server["tokens"] == [answer[:SHORT] for answer in case.expected[1][-FEW:]]
    assert all(case.server["texts"])


def test_bench_serve(case: Case) -> None:
    """the benchmark of a running server completes every request, with every token."""
    measured = case.server["bench"]
    assert (measured["completed"], measured["failed"]) == (bench.PROMPTS, 0)
    assert measured["total_output_tokens"] == bench.PROMPTS * bench.ANSWER


def test_torch_compile(case: Case) -> None:
    """that server compiles its model."""
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in case.server["log"]
    test_openai_server(case)


def test_tensor_parallel(case: Case) -> None:
    """that server has two ranks."""
    assert set(re.findall(r"Worker_TP(\d)", case.server["log"])) == {"0", "1"}
    test_openai_server(case)


def test_sliding_window(case: Case) -> None:
    """a model whose last layer attends 40 tokens only: the tokens are the same, from the prefix cache, too."""
    served, expected = case.windowed
    assert served["tokens"] == [expected] * 2
    assert "3: sliding window of 40" in served["log"] or case.name == "fwsvd"


def test_elastic_rank(case: Case) -> None:
    """the stored latents cut to half their channels: fewer bytes, the transformers path's tokens at that rank."""
    _check_smaller(case, "elastic_rank")


def test_elastic_bits(case: Case) -> None:
    """no channel in more than 4 bits: fewer bytes, the transformers path's tokens with such codes."""
    _check_smaller(case, "elastic_bits")


def _check_smaller(case: Case, feature: str) -> None:
    served, expected = case.smaller(feature)
    assert served["tokens"] == [expected] * 2
    whole, cut = (
        sum(codec.spec.bytes_per_token for codec in load_codec(case.model, **less) if codec is not None)
        for less in ({}, ELASTIC[feature])
    )
    assert f"KV cache {cut} bytes per token" in served["log"]
    assert cut < whole


def test_lora(case: Case) -> None:
    """one engine answers with an adapter and without, in both cases with the transformers path's tokens."""
    served, expected = case.adapted()
    assert served == expected
    assert served[0] != served[1]


def test_refused(
    case: Case, feature: str, record_property: Callable[[str, Any], None], request: pytest.FixtureRequest
) -> None:
    """a feature that does not work is refused, before weights load, with its reason."""
    printed = case.refusal(feature)
    # The message alone: without the exception's name, without what pydantic appends.
    found = re.search(rf"[^\n:\[]*{re.escape(REFUSED[case.name, feature])}[^\n\[]*", printed)
    assert found, printed[-3000:]
    reason = found[0].strip().removeprefix("Value error, ")
    record_property(PROPERTY, (case.name, feature, reason))
    if not request.config.getoption("--support-matrix"):
        assert table.read(table.COMMITTED.read_text())[case.name, feature] == reason


def test_committed_matrix_has_these_cells(request: pytest.FixtureRequest) -> None:
    """The page lists every cell there is a test for, and no other, with what is expected of it."""
    if request.config.getoption("--support-matrix"):
        pytest.skip("the page is being written")
    committed = table.read(table.COMMITTED.read_text())
    assert set(committed) == CELLS
    assert {cell for cell, found in committed.items() if found != table.YES} == set(REFUSED)
    assert table.COMMITTED.read_text() == table.render(committed, shown())


def shown() -> dict[str, str]:
    """What the test of each feature sees, in its own words."""
    tests = vars(sys.modules[__name__])
    return {name: tests[name].__doc__ for name in tests if name.removeprefix("test_") in (*FEATURES, "refused")}
