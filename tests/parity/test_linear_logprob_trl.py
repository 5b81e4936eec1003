"""The reference of linear_logprob has the bits of TRL 1.16's ChunkedLogProbFunction on a CPU: logp, entropy, all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trl.kernels import chunked_logprob

from fastlora.ops.linear_logprob import linear_logprob
from fastlora.ops.registry import use_implementation

WANTED = {"logp": (True, False), "entropy": (False, True), "both": (True, True)}


def _run(function, leaves: list[Tensor], wanted: str) -> list[Tensor]:
    """[logp, entropy, dh, dW, db] of a loss that weights every token differently; `leaves` are h, W and maybe b."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    logp_t, entropy_t = function(*leaves)
    weight_t = torch.linspace(-1, 2, len(logp_t), dtype=logp_t.dtype)
    use_logp, use_entropy = WANTED[wanted]
    loss = (logp_t * weight_t).sum() * use_logp if use_logp else 0
    loss = loss + (entropy_t * weight_t.flip(0)).sum() if use_entropy else loss
    loss.backward()
    return [logp_t.detach(), entropy_t.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("t", "d", "v", "with_bias", "temperature", "token_chunk", "vocab_chunk"),
    [
        (1, 16, 97, False, 1.0, 4096, 32768),
        (63, 64, 97, True, 0.7, 4096, 32768),
        (63, 64, 1031, False, 0.9, 16, 500),
        (1000, 24, 1031, True, 1.3, 300, 1031),
        (37, 576, 33000, False, 1.0, 4096, 32768),
        (257, 63, 4099, False, 0.6, 128, 1024),
    ],
)
def test_bits_equal_trl(monkeypatch, t, d, v, with_bias, temperature, token_chunk, vocab_chunk, dtype, wanted) -> None:
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", token_chunk)
    hidden_td, weight_vd, targets_t = torch.randn(t, d), torch.randn(v, d), torch.randint(v, (t,))
    hidden_td, weight_vd = hidden_td.to(dtype), (weight_vd * 3 / d**0.5).to(dtype)
    leaves = [hidden_td, weight_vd, *([torch.randn(v).to(dtype)] if with_bias else [])]

    def trl(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden_td, weight_vd, bias_v, targets_t, temperature, vocab_chunk, None, 1.0, ("entropy",)
        )
        return outputs[0], outputs[1]

    def ours(hidden_td: Tensor, weight_vd: Tensor, bias_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_logprob(
            hidden_td,
            weight_vd,
            targets_t,
            bias_v=bias_v,
            temperature=temperature,
            token_chunk=token_chunk,
            vocab_chunk=vocab_chunk,
        )

    names = ("logp", "entropy", "dh", "dW", "db")[: 2 + len(leaves)]
    with use_implementation("reference"):
        results = _run(ours, leaves, wanted)
    for name, got, expected in zip(names, results, _run(trl, leaves, wanted), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), f"{name}: max |Δ| = {(got - expected).abs().max():.3e}"
