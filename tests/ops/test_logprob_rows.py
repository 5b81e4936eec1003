"""logprob_rows and its backward pass against torch's log_softmax in fp64, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.ops.logprob_rows import logprob_rows, logprob_rows_backward_, logprob_rows_backward_op
from fastlora.ops.registry import ImplementationError, use_implementation
from tests.ops.implementations import CPP, Variant, needs_extension, running, threads
from tests.tolerances import FP32_LOGPROB, FP64_EXACT

SHAPES = [(0, 7), (1, 2), (3, 15), (5, 17), (63, 97), (4, 4095), (3, 4097), (2, 49_157)]
VARIANTS = [Variant("reference"), *CPP]


def _problem(shape: tuple[int, int], dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z_tv, targets_t, dlogp_t, dentropy_t); the first target is the first token, the last one the last.

    Likely tokens at both ends and at the start of a new block of sums (4,096): one that is left out is seen in every sum.
    """
    t, v = shape
    wide_tv, targets_t = size * torch.randn(t, v, dtype=torch.float64), torch.randint(v, (t,))
    wide_tv[:, [column for column in (0, 4096, v - 1) if column < v]] = 4 * size
    z_tv = wide_tv.to(dtype)
    if t:
        targets_t[0], targets_t[-1] = 0, v - 1
    wide = torch.promote_types(dtype, torch.float32)
    return z_tv, targets_t, *(torch.randn(t, dtype=torch.float64).to(wide) for _ in range(2))


def _ours(z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, temperature: float) -> list[Tensor]:
    """logp, entropy (where it has a gradient), log_z, and the gradient of z."""
    logp_t, entropy_t, log_z_t = logprob_rows(z_tv, targets_t, temperature, dentropy_t is not None)
    dz_tv = z_tv.clone()
    logprob_rows_backward_(dz_tv, targets_t, dlogp_t, dentropy_t, log_z_t, entropy_t, temperature)
    return [logp_t, *([] if dentropy_t is None else [entropy_t]), log_z_t, dz_tv]


def _torchs(z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, temperature: float) -> list[Tensor]:
    """The same through log_softmax in float64."""
    leaf = z_tv.detach().double().requires_grad_()
    log_p_tv = torch.log_softmax(leaf / temperature, -1)
    logp_t = log_p_tv.gather(-1, targets_t[:, None]).squeeze(-1)
    entropy_t = -(log_p_tv.exp() * log_p_tv).sum(-1)
    loss = (logp_t * dlogp_t).sum() + (0 if dentropy_t is None else (entropy_t * dentropy_t).sum())
    (dz_tv,) = torch.autograd.grad(loss, leaf)
    log_z_t = torch.logsumexp(leaf / temperature, -1)
    return [x.detach() for x in (logp_t, *([] if dentropy_t is None else [entropy_t]), log_z_t, dz_tv)]


def _assert_right(
    got: list[Tensor], z_tv: Tensor, targets_t: Tensor, dlogp_t: Tensor, dentropy_t: Tensor | None, temperature: float
) -> None:
    """Log-probabilities and entropy to float32 at the size of the logits; so, relative, every single entry of the gradient.

    The gradient of an entry is a difference of terms of the size of p (for the target, of 1): its error is theirs. It is rounded
    once more to the dtype of z.
    """
    expected = _torchs(z_tv, targets_t, dlogp_t, dentropy_t, temperature)
    limit = FP32_LOGPROB * max(1.0, float(z_tv.abs().max()) / temperature) if z_tv.numel() else 0.0
    for ours, truth in zip(got[:-1], expected[:-1], strict=True):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert ((ours - truth).abs() <= limit).all()
    log_p_tv = torch.log_softmax(z_tv.double() / temperature, -1)
    size_tv = log_p_tv.exp()
    size_tv.scatter_add_(-1, targets_t[:, None], torch.ones_like(size_tv[:, :1]))
    slope_tv = dlogp_t[:, None].abs().expand_as(size_tv)
    if dentropy_t is not None:
        slope_tv = slope_tv + dentropy_t[:, None].abs() * (log_p_tv.abs() + expected[1][:, None])
    dz_tv, rounding = got[-1], torch.finfo(z_tv.dtype).eps
    assert dz_tv.dtype == z_tv.dtype and dz_tv.shape == z_tv.shape
    smallest = torch.finfo(torch.float32).smallest_normal * 10 * slope_tv / temperature  # below it e^x is 0
    assert ((dz_tv - expected[-1]).abs() <= limit * size_tv * slope_tv / temperature + rounding * expected[-1].abs() + smallest).all()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_log_softmax_in_fp64(shape: tuple[int, int], temperature: float, with_entropy: bool) -> None:
    z_tv, targets_t, dlogp_t, dentropy_t = _problem(shape, torch.float64)
    problem = (z_tv, targets_t, dlogp_t, dentropy_t if with_entropy else None, temperature)
    for got, expected in zip(_ours(*problem), _torchs(*problem), strict=True):
        torch.testing.assert_close(got, expected, rtol=FP64_EXACT, atol=20 * FP64_EXACT)  # logits of size 20


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_is_log_softmax_in_low_precision(
    variant: Variant, shape: tuple[int, int], dtype: torch.dtype, temperature: float, with_entropy: bool
) -> None:
    z_tv, targets_t, dlogp_t, dentropy_t = _problem(shape, dtype)
    problem = (z_tv, targets_t, dlogp_t, dentropy_t if with_entropy else None, temperature)
    with running(variant):
        _assert_right(_ours(*problem), *problem)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_far_apart(dtype: torch.dtype, variant: Variant) -> None:
    """±1e4: most probabilities are exactly 0; nothing overflows."""
    problem = (*_problem((9, 101), dtype, size=3e3), 1.0)
    with running(variant):
        got = _ours(*problem)
    assert all(x.isfinite().all() for x in got) and not got[-1].all()
    _assert_right(got, *problem)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_probability_down_to_the_smallest(variant: Variant) -> None:
    """1 to e^−100, through where float32 ends: each entry of the gradient to 1e-3."""
    _, targets_t, dlogp_t, dentropy_t = _problem((3, 201), torch.float32)
    z_tv = -torch.arange(201.0).div(2).expand(3, 201).contiguous()
    problem = (z_tv, targets_t, dlogp_t, dentropy_t, 1.0)
    with running(variant):
        _assert_right(_ours(*problem), *problem)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_token_that_is_ruled_out(with_entropy: bool, variant: Variant) -> None:
    """Logits of −inf: the row is that of a vocabulary without them, 0 log 0 = 0, and their gradient is 0; whole vectors of them too."""
    z_tv, targets_t, dlogp_t, dentropy_t = _problem((5, 67), torch.float32)
    out = torch.zeros(67, dtype=torch.bool)
    out[[3, *range(16, 48), 64]] = True
    targets_t[:] = torch.tensor([0, 5, 15, 50, 66])
    z_tv[:, out] = -torch.inf
    problem = (z_tv, targets_t, dlogp_t, dentropy_t if with_entropy else None, 0.7)
    with running(variant):
        *vectors, dz_tv = _ours(*problem)
    column_t = (~out).cumsum(0)[targets_t] - 1
    _assert_right([*vectors, dz_tv[:, ~out]], z_tv[:, ~out], column_t, *problem[2:])
    assert not dz_tv[:, out].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_target_that_is_ruled_out(variant: Variant) -> None:
    """Its log-probability is −inf, and its gradient, 1 − p, is 1."""
    z_tv, targets_t, dlogp_t, dentropy_t = _problem((2, 19), torch.float32)
    z_tv[0, 0] = -torch.inf
    with running(variant):
        for d_entropy in (None, dentropy_t):
            outputs = _ours(z_tv, targets_t, dlogp_t, d_entropy, 1.0)
            assert outputs[0][0] == -torch.inf and outputs[0][1].isfinite()
            assert outputs[-1][0, 0] == dlogp_t[0] and outputs[-1].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF], ids=hex)
def test_nan_and_inf_spoil_their_row_only(bits: int, variant: Variant) -> None:
    """+inf, and NaN whatever its payload, which the kernels' exponential adds an exponent to."""
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for place in (0, 40, 96):
        z_tv, targets_t, dlogp_t, dentropy_t = _problem((3, 97), torch.float32)
        z_tv[1, place] = value
        with running(variant):
            logp_t, entropy_t, log_z_t, dz_tv = _ours(z_tv, targets_t, dlogp_t, dentropy_t, 1.0)
        assert not logp_t[1].isfinite() and not log_z_t[1].isfinite() and entropy_t[1].isnan() and dz_tv[1, place].isnan()
        assert all(x[[0, 2]].isfinite().all() for x in (logp_t, entropy_t, log_z_t, dz_tv))


@pytest.mark.parametrize("variant", CPP, ids=str)
def test_bits_do_not_depend_on_threads(variant: Variant) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = (*_problem((301, 211), dtype), 0.9)
        with running(variant):
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(_ours(*problem))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_any_memory_layout(variant: Variant) -> None:
    """All but the logits of the backward pass, which are overwritten: see below."""
    z_tv, targets_t, dlogp_t, dentropy_t = _problem((9, 33), torch.float32)
    columns = torch.stack([targets_t, targets_t], 1), torch.stack([dlogp_t, dentropy_t], 1)
    with running(variant):
        got = logprob_rows(z_tv.t().contiguous().t(), columns[0][:, 0], 0.7, True)
        expected = logprob_rows(z_tv, targets_t, 0.7, True)
        torch.testing.assert_close(got, expected)
        overwritten, other = z_tv.clone(), z_tv.clone()
        logprob_rows_backward_(overwritten, columns[0][:, 1], columns[1][:, 0], columns[1][:, 1], expected[2], expected[1], 0.7)
        logprob_rows_backward_(other, targets_t, dlogp_t, dentropy_t, expected[2], expected[1], 0.7)
        assert torch.equal(overwritten, other)


@needs_extension
def test_cpp_overwrites_contiguous_logits_only() -> None:
    z_tv, targets_t, dlogp_t, _ = _problem((9, 33), torch.float32)
    _, _, log_z_t = logprob_rows(z_tv, targets_t, 1.0, False)
    strided = z_tv.t().contiguous().t()
    with use_implementation("cpp"), pytest.raises(ImplementationError, match=r"logprob_rows_backward: .* contiguous"):
        logprob_rows_backward_(strided, targets_t, dlogp_t, None, log_z_t, log_z_t[:0], 1.0)
    logprob_rows_backward_(strided, targets_t, dlogp_t, None, log_z_t, log_z_t[:0], 1.0)
    logprob_rows_backward_(z_tv, targets_t, dlogp_t, None, log_z_t, log_z_t[:0], 1.0)
    torch.testing.assert_close(strided, z_tv)


@pytest.mark.parametrize("target", [-1, 11, -100, 2**40])
@pytest.mark.parametrize("variant", CPP, ids=str)
def test_cpp_refuses_a_target_out_of_range_by_name(variant: Variant, target: int) -> None:
    targets_t, rows = torch.tensor([0, target, 10]), torch.zeros(3)
    message = rf"logprob_rows: target {target} is outside the vocabulary \[0, 11\)"
    with running(variant):
        with pytest.raises(RuntimeError, match=message):
            logprob_rows(torch.zeros(3, 11), targets_t, 1.0, True)
        with pytest.raises(RuntimeError, match=message):
            logprob_rows_backward_(torch.zeros(3, 11), targets_t, rows, None, rows, rows, 1.0)


@pytest.mark.parametrize("target", [-1, 11, -100, 2**40])
def test_the_reference_gives_a_target_out_of_range_nan(target: int) -> None:
    """It is what a GPU runs, where nobody looks at the targets first."""
    z_tv, targets_t, dlogp_t = torch.zeros(2, 11), torch.tensor([3, target]), torch.ones(2)
    with use_implementation("reference"):
        logp_t, _, _, dz_tv = _ours(z_tv, targets_t, dlogp_t, dlogp_t, 1.0)
    assert logp_t[0] == pytest.approx(-float(torch.tensor(11.0).log())) and logp_t[1].isnan()
    assert dz_tv[1] == pytest.approx([-1 / 11] * 11)  # that of −log Z alone: no token is taken for the target


@needs_extension
def test_the_kernels_check_what_they_read() -> None:
    z_tv, targets_t, rows = torch.zeros(3, 11), torch.tensor([0, 1, 2]), torch.zeros(3)
    with use_implementation("cpp"):
        for arguments in (
            (z_tv, targets_t[:2], rows, None, rows, rows),
            (z_tv, targets_t, rows[:2], None, rows, rows),
            (z_tv, targets_t, rows.bfloat16(), None, rows, rows),
            (z_tv, targets_t, rows, rows[:2], rows, rows),
            (z_tv, targets_t, rows, None, rows[:2], rows),
            (z_tv, targets_t, rows, rows, rows, rows[:0]),
        ):
            with pytest.raises(RuntimeError, match="logprob_rows: "):
                logprob_rows_backward_op(*arguments, 1.0)
