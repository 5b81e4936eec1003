"""sample_rows against its definition in float64: the first token whose cumulative probability exceeds u, and its log-probability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.ops.sample_rows import sample_rows
from tests.ops.implementations import CPP, Variant, running
from tests.tolerances import FP32_LOGPROB

VARIANTS = [Variant("reference"), *CPP]
DTYPES = [torch.float32, torch.bfloat16]
LAST = 1 - 2**-53
"""The largest number below 1."""


def _probabilities(z_tv: Tensor, temperature: float) -> Tensor:
    return torch.softmax(z_tv.double() / temperature, -1)


def _run(variant: Variant, z_tv: Tensor, uniforms: list[float] | Tensor, temperature: float = 1.0) -> tuple[list[int], Tensor]:
    with running(variant):
        tokens, logp = sample_rows(z_tv, torch.as_tensor(uniforms, dtype=torch.float64), temperature)
    assert tokens.dtype == torch.int64 and logp.dtype == torch.float32
    return tokens.tolist(), logp


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 97, 1023, 1024, 1025, 2048, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_definition(variant: Variant, dtype: torch.dtype, v: int, temperature: float) -> None:
    """u at 1 %, 50 % and 99 % of the way through the interval of every token with a chance of at least one in a thousand."""
    z_v = (2 * torch.randn(v)).to(dtype)
    p_v = _probabilities(z_v, temperature)
    likely = (p_v > 1e-3).nonzero().squeeze(1)
    before = p_v.cumsum(0) - p_v
    uniforms = torch.cat([before[likely] + share * p_v[likely] for share in (0.01, 0.5, 0.99)])
    tokens, logp = _run(variant, z_v.expand(len(uniforms), -1), uniforms, temperature)
    assert tokens == likely.repeat(3).tolist()
    assert float((logp - p_v.log()[likely].repeat(3)).abs().max()) < FP32_LOGPROB * max(1.0, float(z_v.abs().max()) / temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_ends_of_the_unit_interval(variant: Variant, dtype: torch.dtype) -> None:
    """u = 0 takes the first possible token, u → 1 the last: never one that is ruled out, before, between or behind them."""
    for v, first, last in ((40, 3, 36), (40, 0, 39), (3000, 1024, 2047), (3000, 1023, 2048), (20, 7, 7)):
        z_v = torch.full((v,), -torch.inf)
        z_v[first : last + 1 : max(1, last - first)] = 0.0
        z_v[first : last + 1 : 2] = 0.0
        z_v[last] = 0.0
        tokens, logp = _run(variant, z_v.to(dtype).expand(2, -1), [0.0, LAST])
        assert tokens == [first, last]
        assert float((logp + float(z_v.isfinite().sum().double().log())).abs().max()) < FP32_LOGPROB


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_ruled_out_token_is_never_taken(variant: Variant) -> None:
    z_tv = torch.randn(500, 1500)
    z_tv[torch.rand(z_tv.shape) < 0.7] = -torch.inf
    tokens, logp = _run(variant, z_tv, torch.rand(500, dtype=torch.float64))
    taken = z_tv[torch.arange(500), tokens]
    assert taken.isfinite().all() and logp.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_large_and_far_logits(variant: Variant) -> None:
    """Nothing overflows at 1e4; a token 1e4 below the best has no chance, and gets none."""
    z_tv = torch.tensor([[1e4, 1e4, -1e4, 1e4 - 1], [-1e4, -1e4 - 1, -3e4, -1e4]])
    p_tv = _probabilities(z_tv, 0.5)
    for u in (0.0, 0.3, 0.6, LAST):
        tokens, logp = _run(variant, z_tv, [u, u], 0.5)
        assert tokens == [int((row.cumsum(0) > u * row.sum()).nonzero()[0]) for row in p_tv]
        exact = torch.stack([row[token].log() for row, token in zip(p_tv, tokens, strict=True)])
        assert float((logp - exact).abs().max()) < FP32_LOGPROB * 1e4


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_strided_and_empty(variant: Variant) -> None:
    z_vt, uniforms = torch.randn(50, 7), torch.rand(14, dtype=torch.float64)[::2]
    expected = _run(variant, z_vt.t().contiguous(), uniforms.contiguous())
    got = _run(variant, z_vt.t(), uniforms)
    assert got[0] == expected[0] and torch.equal(got[1], expected[1])
    assert _run(variant, torch.empty(0, 9), [])[0] == []


def test_in_float64() -> None:
    z_v, u = 3 * torch.randn(200, dtype=torch.float64), torch.rand(1000, dtype=torch.float64)
    tokens, logp = sample_rows(z_v.expand(1000, -1), u, 0.8)
    p_v = _probabilities(z_v, 0.8)
    assert torch.equal(tokens, torch.searchsorted(p_v.cumsum(0), u, right=True)) and logp.dtype == torch.float64
    torch.testing.assert_close(logp, p_v.log()[tokens])


@pytest.mark.parametrize(("uniforms", "temperature"), [((3,), 1.0), ((2, 1), 1.0), ((2,), 0.0)], ids=str)
def test_misuse_is_refused(uniforms: tuple[int, ...], temperature: float) -> None:
    with pytest.raises(ValueError, match="one number a row and a positive temperature"):
        sample_rows(torch.randn(2, 5), torch.rand(uniforms, dtype=torch.float64), temperature)
