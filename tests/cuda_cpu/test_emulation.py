"""The emulation of CUDA on the CPU: it computes what a GPU would, and sees what a GPU would not forgive."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_cpu.build import library, needs_gxx, run_under

pytestmark = needs_gxx
THREADS = 256


def run(kernel: str, blocks: int = 8, threads: int = THREADS, workers: int = 2, seed: int = 5) -> tuple[Tensor, int, str]:
    """(what it wrote, the counter, the error or "")."""
    emulated = library("emulated")
    out, counter = torch.full((THREADS,), float("nan")), torch.zeros(1, dtype=torch.int32)
    emulated.emulation_settings(workers, seed)
    status = emulated.run(kernel.encode(), blocks, threads, ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(counter.data_ptr()))
    error = emulated.emulation_error().decode()
    assert (status != 0) == bool(error)
    return out, int(counter), error


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("workers", [1, 2])
def test_barriers_shuffles_and_atomics(workers: int, seed: int) -> None:
    numbers = torch.arange(THREADS, dtype=torch.float32)
    assert torch.equal(run("reverse", 1, workers=workers, seed=seed)[0], numbers.flip(0))
    assert torch.equal(run("warp_sum", 1, workers=workers, seed=seed)[0], numbers.view(-1, 32).sum(1).repeat_interleave(32))
    assert torch.equal(run("lanes_meet", 1, workers=workers, seed=seed)[0], numbers.view(-1, 2).flip(1).view(-1))
    assert run("atomic", 100, workers=workers, seed=seed)[1] == 100 * THREADS
    assert run("last_block", 3, workers=workers, seed=seed)[0][0] == 0 + 1 + 2


def test_shared_memory_is_garbage_at_first() -> None:
    assert bool(run("garbage")[0].isnan().all())


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent", "a barrier or shuffle that not all reach"),
        ("early_exit", "a barrier or shuffle that not all reach"),
        ("half_a_warp", "a shuffle of a part of a warp"),
        ("misaligned", "a 16-byte access that is not aligned"),
    ],
)
def test_what_a_gpu_would_hang_or_trap_at_is_an_error(kernel: str, message: str) -> None:
    assert message in run(kernel)[2]
    assert run("reverse", 1)[2] == "", "the next launch is not affected"


def test_blocks_are_whole_warps() -> None:
    assert "not whole warps" in run("reverse", 1, 100)[2]


@pytest.mark.parametrize(
    ("kernel", "blocks", "races"),
    [
        ("no_barrier", 1, True),
        ("race_between_barriers", 1, True),
        ("lanes_write", 1, True),
        ("lanes_meet", 1, False),
        ("lost_update", 3, True),
        ("unfenced", 3, True),
        ("last_block", 3, False),
    ],
)
def test_races_are_reported(kernel: str, blocks: int, races: bool) -> None:
    ran = run_under("thread", "emulated", arguments=(kernel, str(blocks)))
    assert ("data race" in ran.stderr) == races == (ran.returncode != 0), ran.stderr


def test_reading_behind_shared_memory_is_reported() -> None:
    ran = run_under("address", "emulated", arguments=("behind_shared", "1"))
    assert ran.returncode and "heap-buffer-overflow" in ran.stderr
