"""The optimizer's bookkeeping (skips, counts, state) and the schedule; its numbers are in tests/parity/test_adamw_torch.py."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from fastlora.config import ConfigError, OptimConfig
from fastlora.optim import AdamW, NonFiniteError, learning_rates
from tests.flat import make_flat
from tests.tolerances import FP32_ADAMW


def test_a_bad_step_changes_nothing_and_is_counted() -> None:
    flat = make_flat()
    optimizer = AdamW(flat, OptimConfig(max_nonfinite_steps=3))
    flat.grad.copy_(torch.randn_like(flat.data) * ~flat.gaps)
    optimizer.step(1e-3)
    kept = [b.clone() for b in (flat.data, optimizer.exp_avg, optimizer.exp_avg_sq)]

    good = flat.grad.clone()
    flat.grad[flat.segments[3].offset] = float("nan")
    result = optimizer.step(1e-3)
    assert result.skipped and not result.clipped and result.grad_norm != result.grad_norm
    assert torch.isnan(result.norms_m).tolist() == [i == 3 for i in range(len(flat.segments))]
    flat.grad.copy_(good)
    assert optimizer.step(1e-3, loss_finite=False).skipped
    for before, now in zip(kept, (flat.data, optimizer.exp_avg, optimizer.exp_avg_sq), strict=True):
        assert torch.equal(before, now)
    assert (optimizer.steps_done, optimizer.steps_skipped, optimizer.consecutive_skips) == (1, 2, 2)

    assert not optimizer.step(1e-3).skipped
    assert (optimizer.steps_done, optimizer.steps_skipped, optimizer.consecutive_skips) == (2, 2, 0)


def test_the_last_allowed_bad_step_stops_the_run_and_names_the_segments() -> None:
    flat = make_flat()
    optimizer = AdamW(flat, OptimConfig(max_nonfinite_steps=3))
    flat.grad[[flat.segments[2].offset, flat.segments[5].offset]] = torch.tensor([float("inf"), float("nan")])
    assert optimizer.step(1e-3).skipped and optimizer.step(1e-3).skipped
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step(1e-3)
    message = str(caught.value)
    assert "3 optimizer steps in a row" in message and "loss finite" in message
    assert "in 2 of 10 segments: layers.1.lora_A, layers.2.lora_B." in message


def test_a_bad_loss_alone_stops_the_run_too() -> None:
    optimizer = AdamW(make_flat(), OptimConfig(max_nonfinite_steps=1))
    with pytest.raises(NonFiniteError, match="loss NaN or infinite, gradient of each segment finite"):
        optimizer.step(1e-3, loss_finite=False)


def test_what_lies_between_segments_stays_zero() -> None:
    flat = make_flat()
    optimizer = AdamW(flat, OptimConfig(weight_decay=0.1))
    for _ in range(3):
        flat.grad.copy_(torch.randn_like(flat.data) * ~flat.gaps)
        optimizer.step(1e-2)
    for buffer in (flat.data, optimizer.exp_avg, optimizer.exp_avg_sq):
        assert not buffer[flat.gaps].any()


def test_a_restored_optimizer_continues_to_the_same_bits() -> None:
    flat, config = make_flat(masked=True), OptimConfig(weight_decay=0.1)
    assert flat.mask is not None
    grads = [torch.randn_like(flat.data) * flat.mask * ~flat.gaps for _ in range(6)]
    unbroken = AdamW(flat, config)
    for i, grad in enumerate(grads):
        if i == 3:
            saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in unbroken.state_dict().items()}
            saved_data = flat.data.clone()
        flat.grad.copy_(grad)
        unbroken.step(1e-2)
    expected = [b.clone() for b in (flat.data, unbroken.exp_avg, unbroken.exp_avg_sq)]

    flat.data.copy_(saved_data)
    resumed = AdamW(flat, config)
    resumed.load_state_dict(saved)
    for grad in grads[3:]:
        flat.grad.copy_(grad)
        resumed.step(1e-2)
    assert resumed.steps_done == 6
    for a, b in zip(expected, (flat.data, resumed.exp_avg, resumed.exp_avg_sq), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_layout_is_refused() -> None:
    state = AdamW(make_flat(((3, 5, 7),)), OptimConfig()).state_dict()
    optimizer = AdamW(make_flat(), OptimConfig())
    with pytest.raises(ValueError, match="the state belongs to another adapter"):
        optimizer.load_state_dict(state)
    del state["exp_avg"]
    with pytest.raises(ValueError, match=r"missing or unknown: exp_avg$"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.03, 0.5, 1.0])
def test_state_and_work_follow_the_entries_that_train(density: float) -> None:
    """Counted, not timed: two float32 moments and an int32 position for each, and an op that is given nothing else to go by."""
    flat = make_flat(((16, 640, 480),))
    flat.mask = torch.rand(len(flat.data)) < density
    k = int((flat.mask & ~flat.gaps).sum())
    optimizer = AdamW(flat, OptimConfig(weight_decay=0.1))
    assert flat.num_trainable == k
    assert optimizer.exp_avg.nbytes + optimizer.exp_avg_sq.nbytes == 2 * k * 4
    assert sum(x.nbytes for x in optimizer.state_dict().values() if isinstance(x, torch.Tensor)) == 3 * k * 4
    before = flat.data.clone()
    flat.grad.copy_(torch.randn_like(flat.data)).masked_fill_(~flat.mask, 0.0)
    result = optimizer.step(1e-2)
    moved = flat.data != before
    assert torch.equal(moved, flat.mask & ~flat.gaps) and not result.skipped
    assert result.norms_m.tolist() == pytest.approx([float(g.double().norm()) for g in flat.read(flat.grad)], rel=FP32_ADAMW)


def test_without_a_mask_the_state_is_dense() -> None:
    flat = make_flat()
    assert AdamW(flat, OptimConfig()).state_dict().keys() == {"exp_avg", "exp_avg_sq", "steps_done", "steps_skipped", "consecutive_skips"}
    assert AdamW(flat, OptimConfig()).exp_avg.shape == flat.data.shape


def test_a_state_made_under_another_mask_is_refused() -> None:
    """As many entries, but others; and a mask where there was none, or the reverse. Nothing is copied."""
    flat = make_flat()
    dense = AdamW(flat, OptimConfig()).state_dict()
    flat.mask = torch.arange(len(flat.data)) < 5
    first = AdamW(flat, OptimConfig())
    flat.mask = (torch.arange(len(flat.data)) < 6) & (torch.arange(len(flat.data)) > 0)
    second = AdamW(flat, OptimConfig())
    first.exp_avg.fill_(1.0)
    with pytest.raises(ValueError, match="the state was made under another mask on B"):
        second.load_state_dict(first.state_dict())
    assert not second.exp_avg.any()
    with pytest.raises(ValueError, match=r"missing or unknown: index_k$"):
        second.load_state_dict(dense)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("constant", 0), ("constant_with_warmup", 4), ("linear", 0), ("linear", 3), ("cosine", 5)]
)
def test_schedule_is_the_one_that_transformers_steps_through(schedule: str, warmup: int) -> None:
    """Oracle: the scheduler stepped beside an optimizer, as the Trainer does it; equal to the last bit."""
    config, total = OptimConfig(lr=3e-4, schedule=schedule, warmup_steps=warmup), 17
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=config.lr)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = learning_rates(config, total)
    assert rates == tuple(expected)
    assert max(rates) == config.lr


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "message"),
    [
        ("linear", 10, 10, "warmup_steps = 10 leaves nothing of the run's 10"),
        ("cosine", 11, 10, "leaves nothing"),
        ("constant", 2, 10, "'constant' has no warm-up"),
    ],
)
def test_impossible_schedules_are_refused(schedule: str, warmup: int, total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rates(OptimConfig(schedule=schedule, warmup_steps=warmup), total)
