"""lora_linear's Triton kernels, compiled and run on the CPU (bench/triton_cpu), against fp64: odd token counts, ragged ranks, every dtype.

Outputs are NaN before the launch, programs run in shuffled order, loads and stores are checked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.triton_cpu.launch import Watch, on_cpu
from fastlora_triton import lora_linear as kernels
from tests.ops.implementations import relative_error
from tests.tolerances import SAME_IN_FLOAT32

D = 72
CASES = {
    "one module": ((40,), (16,)),
    "ragged": ((40, 16, 32), (3, 0, 17)),
    "rank 0 first": ((16, 40), (0, 1)),
    "no rank": ((16, 40), (0, 0)),
    "wide": ((136, 264), (64, 256)),
}
DTYPES = {"ieee": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel was to fill is NaN before."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))


def problem(t: int, outs: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments, rounded to dtype once."""
    generator = torch.Generator().manual_seed(t)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "x": normal(t, D),
        "w": normal(sum(outs), D, scale=D**-0.5),
        "bias": normal(sum(outs)),
        "a": normal(sum(ranks), D, scale=D**-0.5),
        "b": normal(sum(n * r for n, r in zip(outs, ranks, strict=True)), scale=0.3),
        "dys": [normal(t, n) for n in outs],
        "scales": [0.5 + m for m in range(len(outs))],
    }


def truth(p: dict[str, Any], outs: tuple[int, ...], ranks: tuple[int, ...], mask: Tensor | None) -> dict[str, Any]:
    """The formulas in fp64."""
    x, a, b = (p[name].double().requires_grad_() for name in ("x", "a", "b"))
    sizes = [n * r for n, r in zip(outs, ranks, strict=True)]
    ys = []
    for w, bias, a_m, b_m, scale, n, r in zip(
        p["w"].double().split(outs), p["bias"].double().split(outs), a.split(ranks), b.split(sizes), p["scales"], outs, ranks, strict=True
    ):
        ys.append(x @ w.T + bias + scale * (x @ a_m.T) @ b_m.view(r, n))
    dx, da, db = torch.autograd.grad(ys, (x, a, b), [dy.double() for dy in p["dys"]], allow_unused=True, materialize_grads=True)
    return {"ys": [y.detach() for y in ys], "dx": dx, "da": da, "db": db if mask is None else db * mask}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0, 1, 63, 200])
def test_forward_and_backward(t: int, case: str, dtype: torch.dtype) -> None:
    outs, ranks = CASES[case]
    p = problem(t, outs, ranks, dtype)
    mask = torch.rand(p["b"].numel()) < 0.5
    expected = truth(p, outs, ranks, mask)
    with on_cpu(Watch(order_seed=t + 1)):
        ys, h = kernels.forward(p["x"], p["w"], p["bias"], p["a"], p["b"], outs, ranks, p["scales"])
        dx, da, db = kernels.backward(p["dys"], p["x"], h, p["w"], p["a"], p["b"], mask, outs, ranks, p["scales"], True, True)
    limit = max(2 * torch.finfo(dtype).eps, SAME_IN_FLOAT32)  # H and dH are rounded to the dtype, as PEFT's are; then the result
    results = [("dx", dx, expected["dx"]), ("da", da, expected["da"]), ("db", db, expected["db"])]
    for name, got, wanted in (*results, *zip("y" * len(ys), ys, expected["ys"], strict=True)):
        assert got.shape == wanted.shape, name
        assert not got.isnan().any() and relative_error(got, wanted) <= limit, name


def test_without_dx_and_da_they_are_not_computed() -> None:
    outs, ranks = CASES["ragged"]
    p = problem(20, outs, ranks, torch.float32)
    with on_cpu():
        _, h = kernels.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
        dx, da, db = kernels.backward(p["dys"], p["x"], h, p["w"], p["a"], p["b"], None, outs, ranks, p["scales"], False, False)
    assert dx.numel() == da.numel() == 0 and relative_error(db, truth(p, outs, ranks, None)["db"]) < 1e-6


def test_gradients_repeat_bit_for_bit_in_any_order_of_programs() -> None:
    outs, ranks = CASES["ragged"]
    p = problem(200, outs, ranks, torch.bfloat16)
    results = []
    for seed in (1, 2):
        with on_cpu(Watch(order_seed=seed)):
            _, h = kernels.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
            results.append(kernels.backward(p["dys"], p["x"], h, p["w"], p["a"], p["b"], None, outs, ranks, p["scales"], True, True))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
