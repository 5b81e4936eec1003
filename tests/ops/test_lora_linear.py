"""lora_linear against dense weights W + s·B·A in fp64, differentiated by torch alone; both implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.lora.packed import join_weights
from fastlora.ops import lora_linear as module
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.registry import use_implementation
from tests.tolerances import FAST_PATH_ERROR_FACTOR, FP64_EXACT

IMPLEMENTATIONS = ("reference", "torch")
D, OUTS = 24, (40, 16, 33)
RANKS = ((3,), (0,), (0, 3, 17), (1, 0, 64), (64, 17, 1), (0, 0, 1))


@dataclass
class Problem:
    """A group of projections: leaves x [*, D], a_rd, b_flat; frozen weights and biases; the dense weights' leaves are copies."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    a_rd: Tensor
    b_flat: Tensor
    b_mask: Tensor | None
    ranks: Sequence[int]
    scales: list[float]

    def run(self) -> list[Tensor]:
        return lora_linear(self.x, self.weights, self.biases, self.a_rd, self.b_flat, self.ranks, self.scales, self.b_mask)

    def dense(self) -> list[Tensor]:
        """y_m = x (W_m + s_m B_m A_m)ᵀ + b_m; B_m is cut out of the flat vector by hand, entries under the mask held constant."""
        b = self.b_flat if self.b_mask is None else torch.where(self.b_mask, self.b_flat, self.b_flat.detach())
        outputs, row, position = [], 0, 0
        for weight, bias, rank, scale in zip(self.weights, self.biases, self.ranks, self.scales, strict=True):
            n = weight.shape[0]
            b_nr = torch.stack([b[position + i * n : position + (i + 1) * n] for i in range(rank)], 1) if rank else b.new_zeros(n, 0)
            dense = weight + scale * (b_nr @ self.a_rd[row : row + rank])
            outputs.append((self.x[..., None, :] * dense).sum(-1) + (0.0 if bias is None else bias))
            row, position = row + rank, position + rank * n
        return outputs


def _problem(
    lead: tuple[int, ...], ranks: Sequence[int], *, bias: bool = False, masked: bool = False, dtype: torch.dtype = torch.float64
) -> Problem:
    outs = OUTS[: len(ranks)]
    size = sum(n * r for n, r in zip(outs, ranks, strict=True))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return Problem(
        randn(*lead, D).requires_grad_(),
        [randn(n, D) / D**0.5 for n in outs],
        [randn(n) if bias and i != 1 else None for i, n in enumerate(outs)],
        (randn(sum(ranks), D) / D**0.5).requires_grad_(),
        randn(size).requires_grad_(),
        torch.rand(size) < 0.5 if masked else None,
        ranks,
        [(0.25, 2.0, -1.5)[i] for i in range(len(ranks))],
    )


def _gradients(outputs: Sequence[Tensor], dys: Sequence[Tensor], problem: Problem) -> list[Tensor]:
    leaves = [x for x in (problem.x, problem.a_rd, problem.b_flat) if x.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, dys, materialize_grads=True))


def _agree(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(got) == len(expected) and all(
        g.shape == e.shape and bool((g - e).abs().le(FP64_EXACT * e.abs().max().clamp(min=1.0) if e.numel() else 0).all())
        for g, e in zip(got, expected, strict=True)
    )


def _matches_dense(problem: Problem, dys: Sequence[Tensor] | None = None) -> bool:
    got, expected = problem.run(), problem.dense()
    dys = [torch.randn_like(y) for y in expected] if dys is None else dys
    return _agree(got, expected) and _agree(_gradients(got, dys, problem), _gradients(expected, dys, problem))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("lead", [(0,), (1,), (63,), (1000,), (2, 5), (3, 0), (2, 1, 7)], ids=str)
def test_matches_dense_weights(lead: tuple[int, ...], ranks: Sequence[int], implementation: str) -> None:
    with use_implementation(implementation):
        for bias, masked in ((False, False), (True, False), (True, True)):
            assert _matches_dense(_problem(lead, ranks, bias=bias, masked=masked))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_leaves_get_no_gradient(implementation: str) -> None:
    """A frozen (S3), x without gradient (first layer): what remains is the same."""
    with use_implementation(implementation):
        for frozen in (("a_rd",), ("x",), ("a_rd", "x")):
            problem = _problem((63,), (3, 1, 17), masked=True)
            for name in frozen:
                getattr(problem, name).requires_grad_(False)
            assert _matches_dense(problem)
            torch.autograd.backward(problem.run(), [torch.ones(63, n, dtype=torch.float64) for n in OUTS])
            assert all(getattr(problem, name).grad is None for name in frozen) and problem.b_flat.grad is not None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), (1,)], ids=str)
def test_only_some_outputs_are_used(used: tuple[int, ...], implementation: str) -> None:
    with use_implementation(implementation):
        problem = _problem((2, 9), (3, 1, 17), bias=True)
        dys = [torch.randn(2, 9, OUTS[i], dtype=torch.float64) for i in used]
        got, expected = ([outputs[i] for i in used] for outputs in (problem.run(), problem.dense()))
        assert _agree(_gradients(got, dys, problem), _gradients(expected, dys, problem))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_in_any_memory_layout(implementation: str) -> None:
    """Expanded (every element the same memory), transposed and sliced dY; x a slice of something larger."""
    with use_implementation(implementation):
        for layout in ("expanded", "transposed", "sliced"):
            problem = _problem((4, 6), (3, 0, 17), bias=True)
            wide = torch.randn(4, 6, 2 * D, dtype=torch.float64, requires_grad=True)
            problem.x = wide[..., 1::2]
            dys = []
            for n in OUTS:
                dy = torch.randn(4, 6, n, dtype=torch.float64)
                dys.append(
                    {
                        "expanded": torch.ones((), dtype=torch.float64).expand(4, 6, n),
                        "transposed": dy.permute(1, 2, 0).contiguous().permute(2, 0, 1),
                        "sliced": torch.cat([dy, dy], -1)[..., ::2],
                    }[layout]
                )
            assert not any(dy.is_contiguous() for dy in dys)
            assert _matches_dense(problem, dys)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_entries_have_a_gradient_of_exactly_zero(implementation: str) -> None:
    with use_implementation(implementation):
        problem = _problem((63,), (3, 0, 17), masked=True, dtype=torch.float32)
        assert problem.b_mask is not None
        torch.stack([y.square().sum() for y in problem.run()]).sum().backward()
        assert problem.b_flat.grad is not None
        assert not problem.b_flat.grad[~problem.b_mask].any() and bool(problem.b_flat.grad[problem.b_mask].all())


def _relative_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    difference = sum(float((g.detach().double() - t.detach()).square().sum()) for g, t in zip(got, truth, strict=True))
    return (difference / sum(float(t.detach().square().sum()) for t in truth)) ** 0.5


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_no_worse_than_plain_torch(implementation: str, adapter_dtype: torch.dtype) -> None:
    """Against fp64, outputs and every gradient apart; plain torch: what PEFT's layer writes, with the adapter in float32 or bfloat16."""
    errors: dict[str, list[list[float]]] = {"ours": [], "torch": []}
    for seed in range(5):
        torch.manual_seed(seed)
        exact = _problem((200,), (3, 0, 17), bias=True)
        low = _problem((200,), (3, 0, 17), bias=True)
        low.x = exact.x.detach().bfloat16().requires_grad_()
        low.weights = [w.bfloat16() for w in exact.weights]
        low.biases = [None if b is None else b.bfloat16() for b in exact.biases]
        low.a_rd, low.b_flat = (t.detach().to(adapter_dtype).requires_grad_() for t in (exact.a_rd, exact.b_flat))
        for name in ("x", "a_rd", "b_flat"):
            setattr(exact, name, getattr(low, name).detach().double().requires_grad_())
        exact.weights = [w.double() for w in low.weights]
        exact.biases = [None if b is None else b.double() for b in low.biases]
        dys = [torch.randn(200, n).bfloat16() for n in OUTS]
        truth = exact.dense()
        true_gradients = _gradients(truth, [dy.double() for dy in dys], exact)
        with use_implementation(implementation):
            for name, outputs in (("ours", low.run()), ("torch", _peft_like(low))):
                assert all(y.dtype == torch.bfloat16 for y in outputs)
                gradients = _gradients(outputs, dys, low)
                assert [g.dtype for g in gradients] == [torch.bfloat16, adapter_dtype, adapter_dtype]
                errors[name].append(
                    [_relative_error(outputs, truth), *(_relative_error([g], [t]) for g, t in zip(gradients, true_gradients, strict=True))]
                )
    ours, plain = (torch.tensor(errors[name]).mean(0) for name in ("ours", "torch"))
    assert (ours <= FAST_PATH_ERROR_FACTOR * plain).all(), (ours, plain)


def _peft_like(p: Problem) -> list[Tensor]:
    """y + B(A(x.to(adapter's dtype)))·s, rounded to bfloat16, module by module, differentiated by torch."""
    outputs, row, position = [], 0, 0
    for weight, bias, rank, scale in zip(p.weights, p.biases, p.ranks, p.scales, strict=True):
        n, y = weight.shape[0], F.linear(p.x, weight, bias)
        b_nr = p.b_flat[position : position + rank * n].view(rank, n).t()
        branch = F.linear(F.linear(p.x.to(p.a_rd.dtype), p.a_rd[row : row + rank]), b_nr) * scale
        outputs.append((y + branch).to(y.dtype))
        row, position = row + rank, position + rank * n
    return outputs


@pytest.mark.parametrize(
    "changes",
    [{"a_rd": torch.zeros(21, D)}, {"a_rd": torch.zeros(20, D + 1)}, {"b_flat": torch.zeros(7)}, {"ranks": (3, 1, 17)}],
    ids=str,
)
def test_shapes_that_disagree_are_refused(changes: dict[str, Any]) -> None:
    problem = _problem((2,), (3, 0, 17))
    for name, value in changes.items():
        setattr(problem, name, value)
    with pytest.raises(ValueError, match=r"lora_linear: a_rd \(.*\) and b_flat \(.*\) do not fit ranks"):
        problem.run()


@pytest.mark.parametrize("bug", ["scale dropped", "mask dropped", "wrong rank offset", "module order"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_these_tests_can_fail(bug: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted bug is seen by the comparison that the other tests rest on."""
    true_op, true_split = module.lora_linear_op, module.module_b

    def broken_op(x: Any, weights: Any, biases: Any, a: Any, b: Any, mask: Any, ranks: Any, scales: Any, absmaxes: Any) -> list[Tensor]:
        if bug == "scale dropped":
            scales = [1.0, *scales[1:]]
        if bug == "mask dropped":
            mask = None
        return true_op(x, weights, biases, a, b, mask, ranks, scales, absmaxes)

    def broken_split(b_flat: Tensor, outs: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
        if bug == "wrong rank offset":  # the last module starts one row too early
            *parts, last = true_split(b_flat, outs, ranks)
            start = last.storage_offset() - outs[-1]
            return [*parts, b_flat.as_strided(last.shape, last.stride(), start)]
        if bug == "module order":
            parts = [b_flat.new_zeros(0)] * len(outs)
            position = b_flat.numel()
            for m in range(len(outs)):
                position -= ranks[m] * outs[m]
                parts[m] = b_flat[position : position + ranks[m] * outs[m]].view(ranks[m], outs[m])
            return parts
        return true_split(b_flat, outs, ranks)

    problem = _problem((9,), (3, 2, 17), masked=True)
    with use_implementation(implementation):
        assert _matches_dense(problem)
        monkeypatch.setattr(module, "lora_linear_op", broken_op)
        monkeypatch.setattr(module, "module_b", broken_split)
        assert not _matches_dense(problem)


def test_joined_weights_are_one_matrix_without_a_copy() -> None:
    """What the Triton kernel reads in place of three weights; apart, in another order or from two storages there is none."""
    layers = [torch.nn.Linear(8, n) for n in (5, 3, 4)]
    before = [layer.weight.detach().clone() for layer in layers]
    assert module.joined([layer.weight for layer in layers]) is None
    join_weights(layers)
    weights = [layer.weight for layer in layers]
    whole = module.joined(weights)
    assert whole is not None and torch.equal(whole, torch.cat(before)) and whole.data_ptr() == weights[0].data_ptr()
    assert module.joined([weights[1], weights[0]]) is None and module.joined([weights[0], weights[2]]) is None
    assert torch.equal(module.joined(weights[1:]), torch.cat(before[1:]))
