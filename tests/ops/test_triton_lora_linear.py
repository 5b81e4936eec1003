"""lora_linear's Triton kernels, compiled and run on the CPU (bench/triton_cpu), against fp64: odd token counts, ragged ranks, every dtype.

Outputs are NaN before the launch, programs run in shuffled order, loads and stores are checked.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton")

from bench.compile_gate import tf32_allowed
from bench.triton_cpu.launch import LaunchError, Watch, on_cpu
from fastlora_triton import lora_linear, lora_linear_backward
from fastlora_triton.forward_path import Path, select_path
from tests.ops.implementations import relative_error
from tests.tolerances import SAME_IN_FLOAT32, TF32_OPERANDS

D = 72
CASES = {
    "one module": ((40,), (16,)),
    "ragged": ((40, 16, 32), (3, 0, 17)),
    "rank 0 first": ((16, 40), (0, 1)),
    "no rank": ((16, 40), (0, 0)),
    "wide": ((136, 264), (64, 256)),
}
DTYPES = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("t", "path"), [(0, "fused"), (1, "cublas"), (63, "fused"), (200, "fused"), (200, "cublas")])
def test_forward_and_backward(t: int, path: Path, case: str, precision: str) -> None:
    with tf32_allowed() if precision == "tf32" else nullcontext():
        compare(t, path, case, precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_thousand_tokens_in_splits(precision: str) -> None:
    compare(1000, "fused", "ragged", precision)


def compare(t: int, path: Path, case: str, precision: str) -> None:
    """Forward and backward with a mask, on the CPU, against fp64."""
    outs, ranks = CASES[case]
    dtype = DTYPES[precision]
    p = problem(t, outs, ranks, dtype)
    mask = torch.rand(p["b"].numel()) < 0.5
    expected = truth(p, outs, ranks, mask)
    with on_cpu(Watch(order_seed=t + 1)):
        ys, h = lora_linear.forward(p["x"], p["w"], p["bias"], p["a"], p["b"], outs, ranks, p["scales"], path)
        dx, da, db = lora_linear_backward.backward(p["dys"], p["x"], h, p["w"], p["a"], p["b"], mask, outs, ranks, p["scales"], True, True)
    # H and dH are rounded to the dtype, as PEFT's are; then the result, and before the adapter is added to the library's product
    limit = TF32_OPERANDS if precision == "tf32" else max(2 * torch.finfo(dtype).eps, SAME_IN_FLOAT32)
    results = [("dx", dx, expected["dx"]), ("da", da, expected["da"]), ("db", db, expected["db"])]
    for name, got, wanted in (*results, *zip("y" * len(ys), ys, expected["ys"], strict=True)):
        assert got.shape == wanted.shape, name
        assert not got.isnan().any() and relative_error(got, wanted) <= limit, name


def test_without_dx_and_da_they_are_not_computed() -> None:
    outs, ranks = CASES["ragged"]
    p = problem(20, outs, ranks, torch.float32)
    with on_cpu():
        _, h = lora_linear.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
        dx, da, db = lora_linear_backward.backward(
            p["dys"], p["x"], h, p["w"], p["a"], p["b"], None, outs, ranks, p["scales"], False, False
        )
    assert dx.numel() == da.numel() == 0 and relative_error(db, truth(p, outs, ranks, None)["db"]) < 1e-6


def test_gradients_repeat_bit_for_bit_in_any_order_of_programs() -> None:
    outs, ranks = CASES["ragged"]
    p = problem(200, outs, ranks, torch.bfloat16)
    results = []
    for seed in (1, 2):
        with on_cpu(Watch(order_seed=seed)):
            _, h = lora_linear.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
            results.append(
                lora_linear_backward.backward(p["dys"], p["x"], h, p["w"], p["a"], p["b"], None, outs, ranks, p["scales"], True, True)
            )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def launched_weight_gradients(
    p: dict[str, Any], ranks: tuple[int, ...], mask: Tensor | None, db: Tensor, da: Tensor, **options: Any
) -> None:
    """dB and dA of a problem from `weight_gradients` alone."""
    outs = tuple(dy.shape[1] for dy in p["dys"])
    with on_cpu(Watch(order_seed=5)):
        _, h = lora_linear.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
        dh = torch.empty_like(h)
        tiles = lora_linear.tiles_for(p["x"])
        lora_linear_backward.rank_gradient(p["dys"], p["b"], dh, lora_linear.layout_of(outs, ranks, p["scales"], tiles, h.device), tiles)
        group = lora_linear_backward.Group(outs, ranks, tuple(p["scales"]))
        lora_linear_backward.weight_gradients(p["dys"], p["x"], h, dh, mask, db, da, group, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_what_leaves_the_epilogue_is_of_the_accumulated_gradient(ordered: bool, masked: bool) -> None:
    outs, ranks = CASES["ragged"]
    p = problem(200, outs, ranks, torch.float32)
    mask = torch.rand(p["b"].numel()) < 0.3 if masked else None
    expected = truth(p, outs, ranks, mask)
    before_b, before_a = torch.randn_like(p["b"]), torch.randn_like(p["a"])
    if mask is not None:
        before_b *= mask
    scores = torch.rand(4, p["b"].numel())
    db, da, got_scores, squares = before_b.clone(), before_a.clone(), scores.clone(), torch.empty(2 * sum(ranks))
    options = {"ordered": ordered, "accumulate": True, "squares_c": squares, "scores_4b": got_scores}
    launched_weight_gradients(p, ranks, mask, db, da, **options)
    total_b, total_a = expected["db"] + before_b, expected["da"] + before_a
    sizes = [n * r for n, r in zip(outs, ranks, strict=True)]
    rows_b = [b.view(r, n) for b, n, r in zip(total_b.split(sizes), outs, ranks, strict=True)]
    expected_squares = torch.cat([row.square().sum(1) for row in (*rows_b, total_a)])
    expected_scores = scores + torch.stack([total_b, total_b.sign(), total_b.abs(), total_b.square()])
    pairs = ((db, total_b), (da, total_a), (squares, expected_squares), (got_scores, expected_scores))
    assert all(relative_error(got, wanted) <= 5 * SAME_IN_FLOAT32 for got, wanted in pairs)


def test_tiles_in_which_nothing_trains_are_not_computed() -> None:
    """Their dy need not even exist: a load from it would be out of bounds."""
    outs, ranks = CASES["wide"]
    p = problem(200, outs, ranks, torch.bfloat16)
    first = outs[0] * ranks[0]
    mask = (torch.arange(p["b"].numel()) >= first).view(torch.uint8)  # the second module alone
    group = lora_linear_backward.Group(outs, ranks, tuple(p["scales"]))
    db, nothing = torch.empty_like(p["b"]), p["a"].new_empty(0)
    with on_cpu():
        _, h = lora_linear.forward(p["x"], p["w"], None, p["a"], p["b"], outs, ranks, p["scales"])
        absent = [p["dys"][0][:0], p["dys"][1]]
        lora_linear_backward.weight_gradients(absent, p["x"], h, h, mask, db, nothing, group)
    assert relative_error(db, truth(p, outs, ranks, mask)["db"]) <= 2 * torch.finfo(torch.bfloat16).eps
    assert not db[:first].any()
    with pytest.raises(LaunchError, match="out of bounds"), on_cpu():
        lora_linear_backward.weight_gradients(absent, p["x"], h, h, None, db, nothing, group)


@pytest.mark.parametrize(("d", "path"), [(1536, "fused"), (8960, "cublas")])
def test_the_predicted_path_of_qwen_groups(d: int, path: Path) -> None:
    x = torch.empty(8192, d, dtype=torch.bfloat16, device="meta")
    assert select_path(x, (1536,), (32,)) == path
    assert select_path(x, (1536,), (0,)) == "cublas"  # nothing to add: the library's product
