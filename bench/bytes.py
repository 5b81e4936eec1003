"""Bytes and FLOPs of every op by the model of bench/l2.py, beside the unfused sequences: `python -m bench.bytes [--json] [--quick]
[--search]`.

    lora_linear             a group's forward (shrink, expand_base) and backward (rank, input and weight gradients, the sum over splits),
                            for the projections of three models, 8,192 tokens, bfloat16, ranks 32 and ragged; beside PEFT's layers
    linear_logprob          the head's forward and its gradient; beside logits in memory
    logprob_rows            256 rows of logits, forward and gradient
    adamw_step              all matrices of the model's adapter at rank 32, with the norms of its gradient

Written are bench/results/sm_90-model/bytes.json, docs/bytes.md and docs/bytes.svg. `--search` first runs every launch of the groups in
other orders of their programs and keeps what each moves in tile_orders.json beside it. `--quick` counts the cases of the floors that can be
counted in a minute and writes nothing. `--docs` only writes the page anew. Status 1 when a floor is missed.

A model's numbers, not measurements: not run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bench.bytes_floors import SMALLEST, floors
from bench.bytes_page import write_page
from bench.compile_gate import MODELS, TOKENS, Model
from bench.eager import EagerOps
from bench.l2 import Memory, counting
from bench.race import REPOSITORY
from bench.rows import Row
from bench.tile_orders import search
from bench.unfused import PeftGroup, StoredLogits
from fastlora.ops.adamw_step import Segment, segment_table
from fastlora_triton import adamw_step, linear_logprob, logprob_rows, lora_linear, lora_linear_backward
from fastlora_triton.group_layout import rank_columns

RESULTS = REPOSITORY / "bench" / "results" / "sm_90-model"
"""Of a model of the chip: no measurements."""
RANKS = {"r 32": (32, 32, 32), "ragged": (17, 0, 3)}
"""A group of fewer members takes the first ones."""
ROWS_OF_LOGITS = 256
Part = Callable[[], Any]


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.bytes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the numbers and floors as one line of JSON, last")
    parser.add_argument("--quick", action="store_true", help="a minute's worth of the floors, nothing is written")
    parser.add_argument("--search", action="store_true", help="run the groups in other orders of their programs too (minutes)")
    parser.add_argument("--docs", action="store_true", help="only write the page anew, from the committed rows")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    if options.search:
        write(RESULTS / "tile_orders.json", list(searched(console)))
    if options.docs:
        rows = read(RESULTS / "bytes.json")
    else:
        chosen = list(quick_cases() if options.quick else cases())
        rows = [row for case in track(chosen, description="counting bytes", console=console) for row in case()]
    orders = read(RESULTS / "tile_orders.json")
    if not options.quick:
        write(RESULTS / "bytes.json", rows)
        write_page(rows, orders, REPOSITORY / "docs")
    found = floors(rows, orders)
    for floor in found:
        console.print(floor.sentence())
    if options.json:
        print(json.dumps({"cases": {name(row): totals(row) for row in rows}, "floors": {floor.key: floor.value for floor in found}}))
    return 0 if all(floor.met for floor in found) else 1


def write(path: Path, rows: Sequence[Row]) -> None:
    """One row a line, and what wrote them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"what": "a model of sm_90, not measured: python -m bench.bytes", "triton": triton.__version__}
    path.write_text(json.dumps(head) + "\n" + "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    """The rows; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def name(row: Row) -> str:
    """`Qwen2.5-1.5B qkv r 32 forward fastlora`."""
    return " ".join(row[key] for key in ("model", "case", "part", "side"))


def totals(row: Row) -> dict[str, float]:
    """Of all launches of a row."""
    sums = {key: sum(launch[key] for launch in row["launches"]) for key in ("l2_bytes", "dram_25", "dram_50", "compulsory", "flops")}
    return sums | {key: row[key] for key in ("warm_25", "warm_50") if key in row}


def cases() -> Iterator[Callable[[], list[Row]]]:
    """Everything."""
    for model in MODELS:
        for group in MODELS[model].groups():
            for ranks in RANKS:
                yield lambda m=model, g=group, r=ranks: lora_rows(m, g, r)
        yield lambda m=model: head_rows(m)
        yield lambda m=model: small_rows(m)


def quick_cases() -> Iterator[Callable[[], list[Row]]]:
    """The groups of Qwen2.5-1.5B and its head's forward."""
    for group in MODELS[SMALLEST].groups():
        yield lambda g=group: lora_rows(SMALLEST, g, "r 32", sides=("fastlora", "PEFT"), warm=False)
    yield lambda: head_rows(SMALLEST, forward_only=True)


def lora_rows(model: str, group: str, ranks: str, sides: Sequence[str] = ("fastlora", "PEFT bf16", "PEFT"), warm: bool = True) -> list[Row]:
    """Forward and backward of a group on every side."""
    d, outs = MODELS[model].groups()[group]
    members = RANKS[ranks][: len(outs)]
    rows = []
    for side in sides:
        for part, run in lora_parts(side, d, outs, members):
            kept = warm and model == SMALLEST and side != "PEFT"
            rows.append({"model": model, "case": f"{group} {ranks}", "part": part, "side": side, **counted(run, kept)})
    return rows


def lora_parts(side: str, d: int, outs: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[tuple[str, Part], tuple[str, Part]]:
    """(("forward", call), ("backward", call)) with tensors that are not filled in; backward comes after forward."""
    x_td = bf16(TOKENS, d)
    if side != "fastlora":
        peft = PeftGroup(d, outs, ranks, torch.bfloat16 if side == "PEFT bf16" else torch.float32)
        return ("forward", lambda: peft.forward(x_td)), ("backward", peft.backward)
    w_nd, a_rd, b_flat = bf16(sum(outs), d), bf16(sum(ranks), d), bf16(sum(n * r for n, r in zip(outs, ranks, strict=True)))
    scales = [2.0] * len(outs)
    dys = [bf16(TOKENS, n) for n in outs]
    h_tp = bf16(TOKENS, rank_columns(ranks))
    return (
        ("forward", lambda: lora_linear.forward(x_td, w_nd, None, a_rd, b_flat, outs, ranks, scales, "fused")),
        ("backward", lambda: lora_linear_backward.backward(dys, x_td, h_tp, w_nd, a_rd, b_flat, None, outs, ranks, scales, True, True)),
    )


def head_rows(model: str, forward_only: bool = False) -> list[Row]:
    """Log-probabilities of 8,192 tokens and their gradient: ours, and with logits in memory."""
    sizes = MODELS[model]
    h_td, w_vd, target_t = bf16(TOKENS, sizes.d), bf16(sizes.vocabulary, sizes.d), torch.zeros(TOKENS, dtype=torch.long)
    vectors = [torch.empty(TOKENS) for _ in range(4)]
    stored = StoredLogits(h_td, w_vd, target_t)
    parts = {
        ("fastlora", "forward"): lambda: linear_logprob.forward(h_td, w_vd, target_t, 0.9),
        ("fastlora", "gradient"): lambda: eager(lambda: linear_logprob.backward(h_td, w_vd, target_t, *vectors, 0.9)),
        ("stored logits", "forward"): stored.forward,
        ("stored logits", "gradient"): stored.backward,
    }
    chosen = list(parts.items())[: 1 if forward_only else None]
    return [{"model": model, "case": "head", "part": part, "side": side, **counted(run, warm=False)} for (side, part), run in chosen]


def small_rows(model: str) -> list[Row]:
    """Rows of logits, and the optimizer."""
    z_tv, target_t = bf16(ROWS_OF_LOGITS, MODELS[model].vocabulary), torch.zeros(ROWS_OF_LOGITS, dtype=torch.long)
    v = [torch.empty(ROWS_OF_LOGITS) for _ in range(4)]
    parts = {
        ("logits", "forward"): lambda: logprob_rows.forward(z_tv, target_t, 0.9, True),
        ("logits", "gradient"): lambda: logprob_rows.backward_(z_tv, target_t, *v, 0.9),
        ("adapter", "adamw_step"): optimizer(MODELS[model]),
    }
    return [
        {"model": model, "case": case, "part": part, "side": "fastlora", **counted(run, warm=False)} for (case, part), run in parts.items()
    ]


def optimizer(model: Model) -> Part:
    """One step over A and B of every projection at rank 32, and the norms before it."""
    shapes = [(32, width) for d, outs in model.groups().values() for width in [*[d] * len(outs), *outs]] * model.layers
    segments, offset = [], 0
    for i, shape in enumerate(shapes):
        segments.append(Segment(str(i), offset, shape, transposed=False))
        offset += segments[-1].numel
    table = segment_table(segments, None)
    param, grad, exp_avg, exp_avg_sq = (torch.empty(offset) for _ in range(4))
    clip = torch.ones(1)

    def step() -> None:
        adamw_step.gradient_norms(grad, table, None)
        adamw_step.adamw_step(param, grad, exp_avg, exp_avg_sq, clip, table, None, 3, 1e-4, 0.9, 0.999, 1e-8, 0.0)

    return step


def counted(part: Part, warm: bool) -> dict[str, Any]:
    """`launches`, each from an empty cache; with `warm` also the bytes of the part from memory when the cache is kept between them."""
    with counting(Memory()) as launches:
        part()
    if not warm:
        return {"launches": [asdict(traffic) for traffic in launches]}
    memory = Memory(warm=True)
    with counting(memory):
        part()
    memory.cache.flush()
    warm_25, warm_50, _ = memory.cache.moved_bytes()
    return {"launches": [asdict(traffic) for traffic in launches], "warm_25": warm_25, "warm_50": warm_50}


def searched(console: Console) -> Iterator[Row]:
    """What every launch of every group at rank 32 moves in every order."""
    every = [(model, group) for model in MODELS for group in MODELS[model].groups()]
    for model, group in track(every, description="searching orders", console=console):
        d, outs = MODELS[model].groups()[group]
        for part, run in lora_parts("fastlora", d, outs, RANKS["r 32"][: len(outs)]):
            for found in search(run):
                yield {"model": model, "case": f"{group} r 32", "part": part, **found}


def eager(part: Part) -> None:
    """A part of which some operations are torch's."""
    with EagerOps():
        part()


def bf16(*shape: int) -> Tensor:
    """Not filled in."""
    return torch.empty(*shape, dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
