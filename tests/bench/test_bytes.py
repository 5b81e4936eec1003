"""The floors on counted bytes, counted anew for the smallest model; the committed rows and their pages; PEFT's sequence."""

from __future__ import annotations

import math
import re
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="bytes are counted from compiled Triton kernels")

from bench import bytes as counted
from bench import bytes_page, compile_gate, roofline
from bench.bytes_floors import GROUPS, SMALLEST, Floor, floors
from bench.compile_gate import MODELS, TOKENS
from bench.eager import EagerOps
from bench.l2 import Memory, counting
from bench.race import REPOSITORY
from bench.unfused import PeftGroup
from fastlora_triton import lora_linear, lora_linear_backward

ROWS = counted.read(counted.RESULTS / "bytes.json")
ORDERS = counted.read(counted.RESULTS / "tile_orders.json")


@pytest.fixture(scope="module")
def quick() -> list[Floor]:
    """The floors of `--quick`."""
    return floors([row for case in counted.quick_cases() for row in case()], ORDERS)


@pytest.mark.parametrize(
    "key",
    [
        *("lora_over_compulsory_25", "lora_over_compulsory_50", "lora_over_peft_25", "lora_over_peft_50"),
        "logprob_over_compulsory_50",  # at 25 MB h alone is more than the cache: not a floor
    ],
)
@pytest.mark.xdist_group("bytes")  # counted once
def test_the_kernels_of_this_commit_hold_the_floors(key: str, quick: list[Floor]) -> None:
    (floor,) = [floor for floor in quick if floor.key == key]
    assert floor.met, floor.sentence()


def test_the_committed_rows_hold_the_floors() -> None:
    found = floors(ROWS, ORDERS)
    assert len(found) == 10
    assert not [floor.sentence() for floor in found if not floor.met]


def test_the_pages_are_those_of_the_committed_rows() -> None:
    assert (REPOSITORY / "docs" / "bytes.md").read_text() == bytes_page.page(ROWS, ORDERS)
    assert (REPOSITORY / "docs" / "roofline.md").read_text() == roofline.page(ROWS)


def test_a_floor_that_is_missed_says_so() -> None:
    launch = {"dram_25": 126, "dram_50": 125, "compulsory": 100}
    rows = [{"model": "Qwen2.5-1.5B", "case": "o r 32", "part": "forward", "side": "fastlora", "launches": [launch]}]
    missed, met = floors(rows, [])
    assert not missed.met and missed.sentence().endswith("1.260 (Qwen2.5-1.5B o r 32), ≤ 1.25, MISSED")
    assert met.met and met.value == 1.25


@pytest.mark.parametrize("model", list(MODELS))
def test_the_committed_compulsory_bytes_are_those_of_the_tensors(model: str) -> None:
    """expand_base reads x, W, H and B and writes y; tables are some kB."""
    for group, (d, outs) in MODELS[model].groups().items():
        n, r = sum(outs), 32
        (row,) = [r for r in ROWS if (r["model"], r["case"], r["part"], r["side"]) == (model, f"{group} r 32", "forward", "fastlora")]
        (launch,) = [launch for launch in row["launches"] if launch["kernel"] == "expand_base_kernel"]
        tensors = 2 * (TOKENS * d + n * d + TOKENS * r * len(outs) + n * r + TOKENS * n)
        assert tensors <= launch["compulsory"] <= tensors + 20_000
        tiles = sum(math.ceil(o / 128) for o in outs) * 128
        assert launch["flops"] == 2 * TOKENS * tiles * (d + r)


def test_peft_runs_its_own_operations_one_by_one() -> None:
    """A layer of rank 8 on [256, 64] -> 128: base, A, B, their scale and the sum; each moves its operands and its result once."""
    t, d, n, r = 256, 64, 128, 8
    peft = PeftGroup(d, (n,), (r,), torch.bfloat16)
    with counting(Memory()) as launches:
        peft.forward(torch.empty(t, d, dtype=torch.bfloat16))
    product, elementwise = "expand_base_kernel", "elementwise_kernel"
    expected = [
        (product, t * d + n * d + t * n),
        (product, t * d + r * d + t * r),
        (product, t * r + n * r + t * n),
        (elementwise, 2 * t * n),
        (elementwise, 3 * t * n),
    ]
    assert [launch.kernel for launch in launches] == [kernel for kernel, _ in expected]
    for launch, (_, elements) in zip(launches, expected, strict=True):
        assert 2 * elements <= launch.compulsory <= 2 * elements + 500  # and tables of a line each
    with counting(Memory()) as launches:
        peft.backward()
    names = [launch.kernel for launch in launches]
    assert names.count("input_gradient_kernel") == 3  # dx of the base and of A, dH
    assert names.count("weight_gradient_kernel") == 2
    assert names.count(elementwise) == 2  # × s, and the sum of the two dx


def test_an_operation_that_is_not_known_is_named() -> None:
    x = torch.zeros(3)
    with EagerOps(), pytest.raises(NotImplementedError, match=r"aten.sort.*say in bench/eager.py"):
        x.sort()


@pytest.mark.parametrize("module", [lora_linear, lora_linear_backward], ids=lambda module: module.__name__)
def test_a_kernels_row_of_numbers_is_that_of_the_committed_results(module: ModuleType) -> None:
    """Registers (the most that the baseline has) and bytes over compulsory, in the docstring of the kernels' file."""
    registers = compile_gate.baselines()["3.9.0"]
    lines = [line.split("|")[1:-1] for line in (module.__doc__ or "").splitlines() if re.match(r"\| \w+_kernel ", line)]
    assert lines
    for kernel, stated, _, ratios in ([cell.strip() for cell in line] for line in lines):
        assert max(map(int, re.findall(r"\d+", stated))) == registers[f"{kernel} bf16"], kernel
        found = [
            f"{launch['dram_25'] / launch['compulsory']:.2f}"
            for group in GROUPS
            for row in ROWS
            if (row["model"], row["case"], row["side"]) == (SMALLEST, f"{group} r 32", "fastlora")
            for launch in row["launches"]
            if launch["kernel"] == kernel
        ]
        assert ratios == ", ".join(found), kernel
