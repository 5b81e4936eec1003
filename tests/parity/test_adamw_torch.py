"""Bit for bit against torch's own `clip_grad_norm_` and `AdamW(fused=True)` on separate tensors in PEFT's shapes.

These are the two calls that TRL's trainer makes (accelerate's clip_grad_norm_ calls torch's; adamw_torch_fused is its default).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.config import OptimConfig
from fastlora.ops.registry import use_implementation
from fastlora.optim import AdamW, StepResult
from tests.flat import ODD_MODULES, HandmadeFlat, make_flat, peft_shapes
from tests.ops.implementations import threads

LARGE_MODULES = ((17, 4099, 2053), (3, 33333, 1), (5, 7, 50021))
"""More than 32,768 elements a tensor: torch splits norms and updates between threads."""

LEARNING_RATES = (1e-4, 1e-2, 3e-3, 0.0, 1e-3, 1e-3, 3e-4, 1e-2, 1e-5, 1e-3)
GRADIENT_SCALES = (1e-6, 10.0, 1e-3, 1.0, 1e-2, 0.0, 100.0, 1e-4, 1.0, 1e-3)
"""Some steps are clipped, some are not, one gradient is zero."""


def gradients(flat: HandmadeFlat) -> list[list[Tensor]]:
    """Ten steps of PEFT-shaped gradients; 0 where the mask freezes."""
    masks = [torch.ones(s, dtype=torch.bool) for s in peft_shapes(flat)] if flat.mask is None else flat.read(flat.mask)
    return [[scale * torch.randn(m.shape) * m for m in masks] for scale in GRADIENT_SCALES]


def run_torch(flat: HandmadeFlat, config: OptimConfig, steps: list[list[Tensor]]) -> tuple[torch.optim.AdamW, list[float]]:
    params = [torch.nn.Parameter(p.clone()) for p in flat.read(flat.data)]
    optimizer = torch.optim.AdamW(params, lr=1.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
    norms = []
    for lr, grads in zip(LEARNING_RATES, steps, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return optimizer, norms


def run_flat(flat: HandmadeFlat, config: OptimConfig, steps: list[list[Tensor]]) -> tuple[AdamW, list[StepResult]]:
    """The reference: the other implementations are held to fp64 (tests/ops/test_adamw_step.py), not to torch's bits."""
    optimizer, results = AdamW(flat, config), []
    with use_implementation("reference"):
        for lr, grads in zip(LEARNING_RATES, steps, strict=True):
            flat.write(flat.grad, grads)
            results.append(optimizer.step(lr))
    return optimizer, results


def assert_same_bits(ours: list[Tensor], torchs: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        wrong = (a.view(torch.int32) != b.detach().view(torch.int32)).sum()
        assert wrong == 0, f"{what} of tensor {i} {tuple(a.shape)}: {wrong} of {a.numel()} entries differ"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("modules", [ODD_MODULES, LARGE_MODULES], ids=["odd", "large"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_ten_steps_give_torchs_bits(modules: tuple[tuple[int, int, int], ...], weight_decay: float, num_threads: int) -> None:
    flat, config = make_flat(modules), OptimConfig(weight_decay=weight_decay, max_grad_norm=1.0)
    steps = gradients(flat)
    with threads(num_threads):
        oracle, torch_norms = run_torch(flat, config, steps)
        ours, results = run_flat(flat, config, steps)

    params = oracle.param_groups[0]["params"]
    assert [r.grad_norm for r in results] == torch_norms
    assert [r.clipped for r in results] == [norm > 1.0 for norm in torch_norms]
    assert_same_bits(flat.read(flat.data), params, "parameters")
    assert_same_bits(flat.read(ours.exp_avg), [oracle.state[p]["exp_avg"] for p in params], "exp_avg")
    assert_same_bits(flat.read(ours.exp_avg_sq), [oracle.state[p]["exp_avg_sq"] for p in params], "exp_avg_sq")
    assert 0 < sum(r.clipped for r in results) < len(results), "the fixture must clip some steps and leave others"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_masked_entries_train_with_torchs_bits_and_the_others_never_move(weight_decay: float) -> None:
    """AdamW is elementwise, so torch on the whole tensors (zero gradient where frozen) gives the trained entries' bits."""
    flat, config = make_flat(masked=True), OptimConfig(weight_decay=weight_decay)
    assert flat.mask is not None
    before, masks, steps = flat.read(flat.data), flat.read(flat.mask), gradients(flat)
    oracle, torch_norms = run_torch(flat, config, steps)
    ours, results = run_flat(flat, config, steps)

    params = oracle.param_groups[0]["params"]
    expected = [torch.where(m, p, old) for m, p, old in zip(masks, params, before, strict=True)]
    assert [r.grad_norm for r in results] == torch_norms
    assert_same_bits(flat.read(flat.data), expected, "parameters")
    for name in ("exp_avg", "exp_avg_sq"):
        moment_k, dense = getattr(ours, name), torch.zeros_like(flat.data)
        assert ours.index_k is not None and len(moment_k) == (flat.mask & ~flat.gaps).sum()
        dense[ours.index_k.long()] = moment_k
        assert_same_bits(flat.read(dense), [oracle.state[p][name] for p in params], name)


def test_skipped_steps_leave_torchs_bits_of_the_other_steps() -> None:
    flat, config = make_flat(), OptimConfig(max_nonfinite_steps=3)
    good = gradients(flat)
    oracle, _ = run_torch(flat, config, good)

    optimizer = AdamW(flat, config)
    with use_implementation("reference"):
        for i, (lr, grads) in enumerate(zip(LEARNING_RATES, good, strict=True)):
            if i in (0, 4, 5):
                bad = [g.clone() for g in grads]
                bad[3][0, 0] = float("nan") if i else float("inf")
                flat.write(flat.grad, bad)
                assert optimizer.step(lr).skipped
            flat.write(flat.grad, grads)
            assert not optimizer.step(lr).skipped
    assert (optimizer.steps_done, optimizer.steps_skipped) == (10, 3)
    assert_same_bits(flat.read(flat.data), oracle.param_groups[0]["params"], "parameters")
