"""The CUDA kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer; and planted bugs, which must be seen."""

from __future__ import annotations

import pytest

from tests.cuda_cpu.build import SANITIZERS, Edit, needs_gxx, run_under

pytestmark = needs_gxx
HARNESSES = ("sparse_db", "adamw_step", "export_adapter")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("harness", HARNESSES)
def test_clean(harness: str, sanitizer: str) -> None:
    ran = run_under(sanitizer, harness)
    assert ran.returncode == 0, ran.stderr


RACE, OUTSIDE, UNDEFINED = ("thread", "data race"), ("address", "heap-buffer-overflow"), ("undefined", "runtime error")
BUGS: dict[str, tuple[str, Edit, tuple[str, str]]] = {
    "no barrier before a tile is read": ("sparse_db", ("sparse_db.cuh", "__syncthreads();  // tiles are there", ""), RACE),
    "no barrier before a tile is overwritten": ("sparse_db", ("sparse_db.cuh", "__syncthreads();  // tiles were read", ""), RACE),
    "lost update of the number of splits": (
        "sparse_db",
        ("device.cuh", "atomicAdd(arrivals, 1) == blocks - 1", "(*arrivals)++ == blocks - 1"),
        RACE,
    ),
    "no fence before a block says that it is done": (
        "adamw_step",
        ("device.cuh", "__threadfence();  // what the barrier has gathered is seen by whoever sees the number", ""),
        RACE,
    ),
    "no barrier in a block's sum": (
        "adamw_step",
        ("adamw_step.cuh", "shared.of_warp[threadIdx.x / 32] = x;\n  __syncthreads();", "shared.of_warp[threadIdx.x / 32] = x;"),
        RACE,
    ),
    "no barrier in the transpose": ("export_adapter", ("export_adapter.cuh", "__syncthreads();  // the tile is there", ""), RACE),
    "one entry too far": (
        "adamw_step",
        ("adamw_step.cuh", "min(p.k - i, static_cast<int64_t>(kQuad))", "min(p.k + 1 - i, static_cast<int64_t>(kQuad))"),
        OUTSIDE,
    ),
    "one column too far": (
        "export_adapter",
        ("export_adapter.cuh", "min(tile.columns - tile.first_column, ", "min(tile.columns + 1 - tile.first_column, "),
        OUTSIDE,
    ),
    "tokens behind the last": ("sparse_db", ("sparse_db.cuh", "if (t < tokens) pack = load_pack", "pack = load_pack"), OUTSIDE),
    "one rank too many in shared memory": (
        "sparse_db",
        ("sparse_db.cuh", "int begin[kRanks], end[kRanks];", "int begin[kRanks], end[kRanks - 1];"),
        UNDEFINED,
    ),
}
"""What it is -> (harness, edit of the source, (sanitizer that sees it, what it says))."""


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(bug: str) -> None:
    harness, edit, (sanitizer, message) = BUGS[bug]
    ran = run_under(sanitizer, harness, (edit,))
    assert ran.returncode and message in ran.stderr, ran.stderr


WRONG = {
    "a split is forgotten": (
        "sparse_db",
        ("sparse_db.cuh", "for (int split = 0; split < p.splits;", "for (int split = 1; split < p.splits;"),
    ),
    "columns of a tile are mixed up": (
        "sparse_db",
        ("sparse_db.cuh", "kTurn * (column % 8) + column / 8", "kTurn * (column % 8) + column / 16"),
    ),
    "a slice is forgotten": ("adamw_step", ("adamw_step.cuh", "for (int s = 0; s < p.slices;", "for (int s = 1; s < p.slices;")),
    "the clip is forgotten": ("adamw_step", ("adamw_step.cuh", "clip * g.at[j]", "clip / clip * g.at[j]")),
    "neighbours are taken for granted": (
        "adamw_step",
        ("adamw_step.cuh", "p.at[kQuad - 1] - p.at[0] == kQuad - 1 && aligned", "aligned"),
    ),
    "the scale is forgotten": ("export_adapter", ("export_adapter.cuh", "values.at[j] *= scale;", "values.at[j] *= 1.0f;")),
    "rows behind the rank are not zero": (
        "export_adapter",
        ("export_adapter.cuh", "row < tile.rank ? there : 0", "there"),
    ),
}
"""Wrong numbers that no sanitizer objects to."""


@pytest.mark.parametrize("bug", WRONG)
def test_wrong_numbers_are_seen(bug: str) -> None:
    harness, edit = WRONG[bug]
    ran = run_under(None, harness, (edit,))
    assert ran.returncode == 1 and "wrong" in ran.stderr, ran.stderr
