"""linear_logprob against torch's own log_softmax of the full logits in float64; its bits against TRL's are in tests/parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops.linear_logprob import linear_logprob, linear_logprob_backward_op, linear_logprob_op
from fastlora.ops.registry import use_implementation
from tests.ops.implementations import CPP, Variant, running
from tests.tolerances import FP32_LOGPROB, FP64_EXACT


def _problem(t: int, d: int, v: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_td, weight_vd, bias_v = (
        torch.randn(t, d, dtype=dtype),
        scale * torch.randn(v, d, dtype=dtype),
        torch.randn(v, dtype=dtype),
    )
    return hidden_td.requires_grad_(), weight_vd, bias_v, torch.randint(v, (t,))


def _oracle(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None, targets_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp_t, entropy_t) from the full logits, in float64."""
    bias = 0.0 if bias_v is None else bias_v.double()
    log_p_tv = torch.log_softmax((hidden_td.double() @ weight_vd.double().t() + bias) / temperature, dim=-1)
    return log_p_tv.gather(-1, targets_t[:, None]).squeeze(-1), -(log_p_tv.exp() * log_p_tv).sum(-1)


def _error(got: Tensor, expected: Tensor) -> float:
    difference, size = (got - expected).detach().abs(), expected.detach().abs()
    return float(difference.max() / size.max().clamp(min=1e-300)) if expected.numel() else 0.0


@pytest.mark.parametrize("v", [97, 1031])
@pytest.mark.parametrize("t", [0, 1, 63, 200])
@pytest.mark.parametrize("chunks", [(4096, 32768), (62, 96), (64, 31), (1, 97)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_matches_log_softmax(implementation: str, t: int, v: int, chunks: tuple[int, int]) -> None:
    hidden_td, weight_vd, bias_v, targets_t = _problem(t, 7, v)
    if t:
        targets_t[0], targets_t[-1] = 0, v - 1
    for bias, temperature in ((None, 1.0), (bias_v, 0.7)):
        expected = _oracle(hidden_td, weight_vd, bias, targets_t, temperature)
        weights = torch.randn(2, t, dtype=torch.float64)
        options = {"bias_v": bias, "temperature": temperature, "token_chunk": chunks[0], "vocab_chunk": chunks[1]}
        with use_implementation(implementation):
            got = linear_logprob(hidden_td, weight_vd, targets_t, **options)
            dh = [torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), hidden_td)[0] for logp, entropy in (got, expected)]
        for ours, theirs in (*zip(got, expected, strict=True), dh):
            assert ours.shape == theirs.shape and ours.dtype == torch.float64
            assert _error(ours, theirs) < FP64_EXACT


@pytest.mark.parametrize("used", ["logp", "entropy", "both"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(used: str, with_bias: bool) -> None:
    hidden_td, weight_vd, bias_v, targets_t = _problem(5, 4, 13)

    def function(hidden_td: Tensor) -> tuple[Tensor, ...]:
        logp_t, entropy_t = linear_logprob(
            hidden_td, weight_vd, targets_t, bias_v=bias_v if with_bias else None, temperature=0.8, token_chunk=2, vocab_chunk=5
        )
        return {"logp": (logp_t,), "entropy": (entropy_t,), "both": (logp_t, entropy_t)}[used]

    assert torch.autograd.gradcheck(function, hidden_td)


def test_gradcheck_trained_head() -> None:
    """Full fine-tuning: h, W and b all train."""
    hidden_td, weight_vd, bias_v, targets_t = _problem(5, 3, 11)

    def function(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden_td, weight_vd, targets_t, bias_v=bias_v, temperature=0.8, token_chunk=2, vocab_chunk=4)

    assert torch.autograd.gradcheck(function, (hidden_td, weight_vd.requires_grad_(), bias_v.requires_grad_()))


def test_without_entropy_the_rest_is_the_same() -> None:
    hidden_td, weight_vd, _, targets_t = _problem(63, 16, 97, torch.float32)
    results = []
    for with_entropy in (True, False):
        logp_t, entropy_t = linear_logprob(hidden_td, weight_vd, targets_t, with_entropy=with_entropy, vocab_chunk=40)
        assert entropy_t.shape == ((63,) if with_entropy else (0,))
        results.append((logp_t, *torch.autograd.grad((logp_t**2).sum() + entropy_t[:0].sum(), hidden_td)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_low_precision_inputs_give_float32_logp(variant: Variant, dtype: torch.dtype) -> None:
    """Forced `cpp`: linear_logprob has none and takes whole rows, whose kernels are C++."""
    hidden_td, weight_vd, _, targets_t = _problem(63, 32, 1031, dtype, scale=0.3)
    with running(variant):
        logp_t, entropy_t = linear_logprob(hidden_td, weight_vd, targets_t, vocab_chunk=100)
        (dh_td,) = torch.autograd.grad(logp_t.sum(), hidden_td)
    assert logp_t.dtype == entropy_t.dtype == torch.float32 and dh_td.dtype == dtype
    if dtype == torch.float32:
        for got, expected in zip((logp_t, entropy_t), _oracle(hidden_td, weight_vd, None, targets_t, 1.0), strict=True):
            assert _error(got, expected) < FP32_LOGPROB


def test_extreme_logits_stay_finite() -> None:
    """Logits of ±1e4: probabilities underflow to exactly 0 and 1; log-probabilities, entropy and gradients stay finite."""
    hidden_td, weight_vd, _, targets_t = _problem(63, 16, 97, torch.float32, scale=3e3)
    logp_t, entropy_t = linear_logprob(hidden_td, weight_vd, targets_t, token_chunk=20, vocab_chunk=30)
    expected_logp_t, expected_entropy_t = _oracle(hidden_td, weight_vd, None, targets_t, 1.0)
    assert logp_t.min() < -1e4 and _error(logp_t, expected_logp_t) < FP32_LOGPROB
    # Entropy is log Z − Σ p z, two numbers of the size of the logits: its error is theirs, not its own.
    logit_size = float((hidden_td.detach() @ weight_vd.t()).abs().max())
    assert (entropy_t - expected_entropy_t).abs().max() < FP32_LOGPROB * logit_size
    (dh_td,) = torch.autograd.grad(logp_t.sum() + entropy_t.sum(), hidden_td)
    assert dh_td.isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_never_holds_the_logits(implementation: str) -> None:
    """No tensor made on the way is larger than the tile, the weights' slice, or the hidden states."""
    sizes: list[int] = []
    t, d, v, token_chunk, vocab_chunk = 60, 4, 400, 16, 50
    hidden_td, weight_vd, _, targets_t = _problem(t, d, v)
    hidden_td = hidden_td.detach()
    inputs = {hidden_td.untyped_storage().data_ptr(), weight_vd.untyped_storage().data_ptr()}  # views of them hold nothing new

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in inputs:
                sizes.append(result.numel())
            return result

    with use_implementation(implementation), Watch():  # the implementations themselves: from outside, an op is opaque to the watch
        logp_t, entropy_t, log_z_t = linear_logprob_op._init_fn(hidden_td, weight_vd, None, targets_t, 1.0, True, token_chunk, vocab_chunk)
        linear_logprob_backward_op._init_fn(
            logp_t, entropy_t, hidden_td, weight_vd, None, targets_t, log_z_t, entropy_t, 1.0, token_chunk, vocab_chunk, False, False
        )
    assert max(sizes) == token_chunk * vocab_chunk


def test_frozen_head_costs_no_weight_gradient() -> None:
    hidden_td, weight_vd, bias_v, targets_t = _problem(3, 4, 11)
    logp_t, entropy_t, log_z_t = linear_logprob_op(hidden_td, weight_vd, bias_v, targets_t, 1.0, True, 2, 5)
    saved = (hidden_td.detach(), weight_vd, bias_v, targets_t, log_z_t, entropy_t)
    sizes = [x.numel() for x in linear_logprob_backward_op(logp_t.detach(), None, *saved, 1.0, 2, 5, False, False)]
    assert sizes == [12, 0, 0]
    logp_t.sum().backward()
    assert weight_vd.grad is None and bias_v.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"targets_t": torch.tensor([0, 11, 2])}, r"targets span \[0, 11\], outside the vocabulary \[0, 11\)"),
        ({"targets_t": torch.tensor([0, -100, 2])}, "-100"),
        ({"targets_t": torch.tensor([0, 1])}, "shapes"),
        ({"weight_vd": torch.zeros(11, 5)}, "shapes"),
        ({"bias_v": torch.zeros(10)}, "shapes"),
        ({"weight_vd": torch.zeros(11, 4, dtype=torch.bfloat16)}, "weight_vd is torch.bfloat16"),
        ({"vocab_chunk": 0}, "vocab_chunk 0"),
    ],
    ids=str,
)
def test_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_td": torch.zeros(3, 4),
        "weight_vd": torch.zeros(11, 4),
        "targets_t": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **changes})


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("target", [-1, 11, 40])
def test_target_out_of_range_is_nan_where_it_is_not_checked(target: int, implementation: str) -> None:
    """On a GPU nobody reads the targets first; the op itself must then not invent a log-probability. (float64: no C++, as there.)"""
    hidden_td, weight_vd = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(11, 4, dtype=torch.float64)
    with use_implementation(implementation):
        logp_t, _, _ = linear_logprob_op(hidden_td, weight_vd, None, torch.tensor([3, target]), 1.0, True, 4096, 5)
    assert logp_t[0].item() == pytest.approx(-math.log(11)) and logp_t[1].isnan()
