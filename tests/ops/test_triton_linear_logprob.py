"""linear_logprob's Triton kernels, compiled and run on the CPU (bench/triton_cpu), against fp64: vocabularies that no tile divides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora_triton import linear_logprob as kernels
from tests.ops.implementations import relative_error

D = 72


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "v"), [(0, 64), (1, 131), (63, 1000), (200, 2049)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_and_backward(t: int, v: int, temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(t)
    h, w = (torch.randn(n, D, generator=generator).to(dtype) for n in (t, v))
    w *= 0.3
    target = torch.randint(0, v, (t,), generator=generator)
    dlogp, dentropy = torch.randn(2, t, generator=generator)
    leaf = h.double().requires_grad_()
    log_p = (leaf @ w.double().T / temperature).log_softmax(-1)
    logp, entropy = log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    (dh,) = torch.autograd.grad((logp, entropy), leaf, (dlogp.double(), dentropy.double()))
    with on_cpu(Watch(order_seed=t + 1)):
        got_logp, got_entropy, log_z = kernels.forward(h, w, target, temperature)
        got_dh = kernels.backward(h, w, target, dlogp, dentropy, got_entropy, log_z, temperature, slab=1024)
    assert relative_error(got_logp, logp) < 1e-6 and relative_error(got_entropy, entropy) < 1e-5
    assert relative_error(got_dh, dh) < max(2e-6, 2 * torch.finfo(dtype).eps)
