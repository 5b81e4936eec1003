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
    compare(t, v, temperature, dtype)


@pytest.mark.parametrize(("v", "dtype"), [(9001, torch.float32), (40001, torch.bfloat16)])
def test_programs_with_several_tiles_of_the_vocabulary(v: int, dtype: torch.dtype) -> None:
    """Where the vocabulary has fewer tiles than two waves have programs, each has one, and the running maximum never runs."""
    compare(200, v, 1.0, dtype)


def compare(t: int, v: int, temperature: float, dtype: torch.dtype) -> None:
    """Both outputs and dh, on the CPU, against fp64."""
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


def test_without_entropy_and_a_target_outside() -> None:
    h, w = torch.randn(5, D), torch.randn(131, D)
    target = torch.tensor([0, 131, 130, -1, 7])
    with on_cpu():
        logp, entropy, log_z = kernels.forward(h, w, target, 1.0, with_entropy=False)
        dh = kernels.backward(h, w, target, torch.ones(5), None, entropy, log_z, 1.0)
    assert entropy.numel() == 0 and logp.isnan().tolist() == [False, True, False, True, False]
    leaf = h.double().requires_grad_()
    expected = (leaf @ w.double().T).log_softmax(-1)
    inside = torch.tensor([0, 2, 4])
    (wanted,) = torch.autograd.grad(expected[inside, target[inside]].sum(), leaf)
    assert relative_error(logp[inside], expected[inside, target[inside]]) < 1e-6 and relative_error(dh[inside], wanted[inside]) < 2e-6
