from __future__ import annotations

import pytest
import torch

from kvcompress.calibration.statistics import LayerAccumulator, LayerStatistics
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import LatentBasis, channels
from kvcompress.methods.pca import Pca, PcaConfig

KV_HEADS, GROUP, HEAD_DIM, TOKENS = 2, 2, 32, 4000


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, LayerStatistics]:
    """Correlated queries, keys and values of one layer, and their statistics."""
    generator = torch.Generator().manual_seed(0)

    def correlated(heads: int) -> torch.Tensor:
        mixing = (
            torch.randn(heads, HEAD_DIM, HEAD_DIM, generator=generator) * torch.logspace(0, -1.5, HEAD_DIM)[:, None]
        )
        return torch.randn(1, heads, TOKENS, HEAD_DIM, generator=generator) @ mixing + 1.0

    query, key, value = correlated(KV_HEADS * GROUP), correlated(KV_HEADS), correlated(KV_HEADS)
    weight = torch.randn(64, KV_HEADS * GROUP * HEAD_DIM, generator=generator)
    accumulator = LayerAccumulator()
    for part in range(4):
        cut = slice(part * 1000, (part + 1) * 1000)
        accumulator.add(query[:, :, cut], key[:, :, cut], value[:, :, cut], 0.25)
    return query, key, value, weight, accumulator.finish(weight)


def fit(metric: str, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
    return Pca().fit(PcaConfig.model_validate({"method": "pca", "metric": metric}), statistics)


def truncate(basis: LatentBasis, x_HTD: torch.Tensor, rank: int) -> torch.Tensor:
    latent = (x_HTD - basis.mean_HD[:, None]) @ basis.basis_HDR[..., :rank]
    return basis.mean_HD[:, None] + latent @ basis.inverse_HRD[:, :rank]


def test_statistics_are_the_textbook_moments(sample) -> None:  # type: ignore[no-untyped-def]
    query, key, _, weight, statistics = sample
    torch.testing.assert_close(statistics.keys.mean_HD, key[0].double().mean(1))
    expected = torch.stack([torch.cov(head.double().T, correction=0) for head in key[0]])
    torch.testing.assert_close(statistics.keys.covariance_HDD, expected, rtol=1e-6, atol=1e-8)
    first_group = query[0, :GROUP].double().flatten(0, 1) * 0.25
    torch.testing.assert_close(statistics.query_moment_HDD[0], first_group.T @ first_group / len(first_group))
    block = weight.double()[:, HEAD_DIM * GROUP :].unflatten(1, (GROUP, HEAD_DIM))
    expected_output = sum(block[:, head].T @ block[:, head] for head in range(GROUP))
    torch.testing.assert_close(statistics.output_moment_HDD[1], expected_output)


def test_first_tokens_are_measured_about_the_mean_of_all(sample) -> None:  # type: ignore[no-untyped-def]
    _, key, _, _, statistics = sample
    first = key[0, :, ::1000].double() - key[0].double().mean(1, keepdim=True)
    torch.testing.assert_close(statistics.keys.first_HDD, first.mT @ first / first.shape[1], rtol=1e-6, atol=1e-8)
    assert LayerStatistics.from_tensors(statistics.tensors()).tensors().keys() == statistics.tensors().keys()


@pytest.mark.parametrize("metric", ["none", "attention"])
def test_massive_first_tokens_get_two_axes_of_their_own(metric: str) -> None:
    """In all other channels they are then as large as any token."""
    torch.manual_seed(1)
    query, key, value = (
        torch.randn(8, 4, 64, HEAD_DIM),
        torch.randn(8, 2, 64, HEAD_DIM),
        torch.randn(8, 2, 64, HEAD_DIM),
    )
    key[:, :, 0, [1, 5]] *= 100
    accumulator = LayerAccumulator()
    accumulator.add(query, key, value, 0.25)
    keys, _ = fit(metric, accumulator.finish(torch.randn(32, 4 * HEAD_DIM)))
    latent_BHTR = (key - keys.mean_HD[:, None]) @ keys.basis_HDR
    torch.testing.assert_close(
        keys.basis_HDR @ keys.inverse_HRD, torch.eye(HEAD_DIM).expand(2, -1, -1), rtol=0, atol=1e-4
    )
    assert (keys.variance_HR[:, 1] > 10 * keys.variance_HR[:, 2]).all()
    rest_BHT = latent_BHTR[..., 2:].square().sum(-1)
    assert rest_BHT[:, :, 0].max() < 3 * rest_BHT[:, :, 1:].mean()


@pytest.mark.parametrize("metric", ["none", "attention"])
def test_full_rank_loses_nothing(sample, metric: str) -> None:  # type: ignore[no-untyped-def]
    _, key, value, _, statistics = sample
    for basis, x in zip(fit(metric, statistics), (key[0], value[0]), strict=True):
        torch.testing.assert_close(truncate(basis, x, HEAD_DIM), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", ["none", "attention"])
def test_channels_are_ordered_uncorrelated_and_have_the_stated_variance(sample, metric: str) -> None:  # type: ignore[no-untyped-def]
    _, key, _, _, statistics = sample
    basis = fit(metric, statistics)[0]
    assert (basis.variance_HR.diff(dim=-1) <= 1e-6 * basis.variance_HR[:, :1]).all()
    latent = ((key[0] - basis.mean_HD[:, None]) @ basis.basis_HDR).double()
    covariance = latent.mT @ latent / TOKENS
    torch.testing.assert_close(
        torch.diagonal(covariance, dim1=-2, dim2=-1).float(), basis.variance_HR, rtol=2e-3, atol=1e-4
    )
    off_diagonal = covariance - torch.diag_embed(torch.diagonal(covariance, dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3 * covariance.abs().max()


def test_metric_minimises_what_attention_sees(sample) -> None:  # type: ignore[no-untyped-def]
    """At half rank the attention metric gives smaller score and output errors; plain PCA smaller key errors."""
    query, key, value, weight, statistics = sample
    rank = HEAD_DIM // 2
    errors = {}
    for metric in ("none", "attention"):
        k_basis, v_basis = fit(metric, statistics)
        key_error = (truncate(k_basis, key[0], rank) - key[0]).repeat_interleave(GROUP, 0)
        value_error = (truncate(v_basis, value[0], rank) - value[0]).repeat_interleave(GROUP, 0)
        scores = torch.einsum("hqd,htd->hqt", query[0, :, :200], key_error)
        output = torch.einsum("htd,ohd->to", value_error, weight.unflatten(1, (-1, HEAD_DIM)))
        errors[metric] = [float(x.square().mean()) for x in (scores, output, key_error)]
    assert errors["attention"][0] < 0.95 * errors["none"][0]
    assert errors["attention"][1] <= 1.02 * errors["none"][1]
    assert errors["none"][2] < errors["attention"][2]


def test_same_statistics_same_bytes(sample) -> None:  # type: ignore[no-untyped-def]
    first, second = (fit("attention", sample[-1])[0] for _ in range(2))
    assert torch.equal(first.basis_HDR, second.basis_HDR)


def test_ranks_are_shares_or_counts() -> None:
    geometry = ModelGeometry("LlamaForCausalLM", 2, 128, 4, 2, 64, 1024, 1000, (None, None))
    for given, expected in (({"k": 0.75, "v": 32}, (48, 32)), (1.0, (64, 64)), (0.01, (8, 8))):
        assert Pca().ranks(PcaConfig.model_validate({"method": "pca", "rank": given}), geometry) == expected


@pytest.mark.parametrize(("rank", "words"), [(72, "rank 72 is above head_dim 64"), (50, "use 48 or 56"), (3, "use 8")])
def test_impossible_ranks(rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        channels(rank, 64)
