"""Compiles every kernel for a GPU that is not there and holds its machine code to limits: `python -m bench.compile_gate [--json]`.

nvcc's kernels (csrc/cuda) come from bench/cuda_gate.py; `--no-cuda` leaves them out where there is no nvcc. Triton's launchers run with
tensors on the meta device, so that arguments, constants and divisibility are those of a real launch: the three projections groups and the
head of three models, even and ragged ranks, bfloat16, float16 and TF32. Limits: no stack (that is: no spills), shared memory of a CTA
within the chip's, tensor cores in every matrix kernel (on sm_90 wgmma and no mma.sync), wide loads where there is a TMA, at least one CTA
on an SM, and on sm_90 registers within REGISTER_BAND of bench/compile_baseline.json (`--write-baseline` makes the part of this version of
triton anew).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import cuda_gate
from bench.cubin import CHIPS, Variant, read
from fastlora.ops.adamw_step import Segment, segment_table
from fastlora_triton import adamw_step, export_adapter, grpo_loss, linear_logprob, logprob_rows, lora_linear, lora_linear_backward
from fastlora_triton.export_layout import export_tiles
from fastlora_triton.front_end import compile_for
from fastlora_triton.launch import use_launcher

BASELINE = Path(__file__).with_name("compile_baseline.json")
REGISTER_BAND = 0.1
"""Of the baseline of the same version of triton: what a rebuilt kernel may take without anyone having looked at it."""
MATRIX_KERNELS = {
    "shrink_kernel",
    "expand_base_kernel",
    "expand_add_kernel",
    "rank_gradient_kernel",
    "input_gradient_kernel",
    "weight_gradient_kernel",
    "logprob_parts_kernel",
    "logit_gradient_kernel",
}
NARROW_LOADS = {("weight_gradient_kernel", "tf32")}
"""wgmma takes 32-bit operands with k innermost only, and here k is the token: 4-byte copies transpose on the way into shared memory."""
TENSOR_CORE = {80: ("HMMA", "mma.sync"), 90: ("HGMMA", "wgmma"), 100: ("UTC", "tcgen05")}
"""Capability -> how the machine's instructions start, and what the manual calls them."""
TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """Widths of a published decoder."""

    layers: int
    d: int
    query: int
    key: int
    mlp: int
    vocabulary: int

    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (width of the input, outputs of the members)."""
        return {
            "qkv": (self.d, (self.query, self.key, self.key)),
            "o": (self.query, (self.d,)),
            "gate_up": (self.d, (self.mlp, self.mlp)),
            "down": (self.mlp, (self.d,)),
        }


MODELS = {
    "Qwen2.5-1.5B": Model(28, 1536, 1536, 256, 8960, 151936),
    "Qwen3-1.7B": Model(28, 2048, 2048, 1024, 6144, 151936),
    "Qwen3-8B": Model(36, 4096, 4096, 1024, 12288, 151936),
}
RANKS = ((32, 32, 32), (17, 0, 3), (64, 1, 256))
"""Even, ragged, uneven; a group of fewer members takes the first ones."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
EXPORTED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring. Status 1 when a limit is broken."""
    arguments = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments.add_argument("--capability", type=int, default=90, choices=sorted(CHIPS), help="compute capability × 10")
    arguments.add_argument("--write-baseline", action="store_true", help="take today's registers as the baseline")
    arguments.add_argument("--docs", type=Path, help="write the table as Markdown to this file (docs/kernels.md)")
    arguments.add_argument("--no-cuda", action="store_true", help="without nvcc's kernels")
    options = arguments.parse_args(argv)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    variants, failures = compile_all(options.capability, console), []
    if not options.no_cuda:
        try:
            variants += cuda_gate.compile_all(options.capability)
        except cuda_gate.NvccError as error:
            failures.append(f"{error}; --no-cuda leaves its kernels out")
    if options.write_baseline:
        BASELINE.write_text(json.dumps({**baselines(), triton.__version__: registers(variants)}, indent=1) + "\n")
    failures += broken_limits(variants, options.capability)
    header, rows = cells(variants, options.capability)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    if options.docs:
        options.docs.write_text(page(header, rows, options.capability, options.docs, failures))
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.json:
        print(json.dumps(summary(variants, failures)))
    return 1 if failures else 0


def compile_all(capability: int, console: Console) -> list[Variant]:
    """Every kernel in every case, each machine code once."""
    variants: dict[tuple[str, str], Variant] = {}
    for name, dtype, run in track(list(cases()), description=f"compiling for sm_{capability}", console=console):

        def compiled(kernel: Any, grid: Sequence[int], *args: Any, case: str = name, dtype: str = dtype, **options: Any) -> None:
            built = compile_for(capability, kernel, grid, *args, **options)
            key = (built.metadata.name, built.hash)
            if key not in variants:
                variants[key] = Variant(built.metadata.name, dtype, case, read(built))

        with use_launcher(compiled, capability), tf32_allowed():
            run()
    return sorted(variants.values(), key=lambda v: (v.kernel, v.dtype, v.case))


def cases() -> Iterator[tuple[str, str, Any]]:
    """(name, dtype, call) of every launch."""
    for model_name, model in MODELS.items():
        for dtype_name, dtype in DTYPES.items():
            for group, (d, outs) in model.groups().items():
                for ranks in RANKS:
                    members = ranks[: len(outs)]
                    yield f"{model_name} {group} r {members}", dtype_name, lambda d=d, o=outs, r=members, t=dtype: run_lora(d, o, r, t)
            yield f"{model_name} head", dtype_name, lambda m=model, t=dtype: run_head(m, t)
    for loss in ("grpo", "cispo", "sapo"):
        yield f"{loss}, KL", "fp32", lambda k=loss: run_loss(k)
    for dtype_name, dtype in EXPORTED.items():
        yield "export, r 32", dtype_name, lambda t=dtype: run_export(t)
    for entries in (None, 100_000):
        yield f"adamw, {'all entries' if entries is None else 'an index'}", "fp32", lambda k=entries: run_optimizer(k)


def run_lora(d: int, outs: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and backward of a group, with a mask and without bias."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, w, a = empty(TOKENS, d), empty(sum(outs), d), empty(sum(ranks), d)
    b = empty(sum(n * r for n, r in zip(outs, ranks, strict=True)))
    mask = torch.empty(b.numel(), dtype=torch.bool, device="meta")
    scales = [2.0] * len(outs)
    for path in ("cublas", "fused"):
        ys, h = lora_linear.forward(x, w, None, a, b, outs, ranks, scales, path)
    lora_linear_backward.backward(ys, x, h, w, a, b, mask, outs, ranks, scales, True, True)
    squares, scores = torch.empty(2 * sum(ranks), device="meta"), torch.empty(4, b.numel(), device="meta")
    group = lora_linear_backward.Group(outs, ranks, tuple(scales))
    db, da = (torch.empty(size, device="meta") for size in (b.numel(), a.numel()))
    options = {"ordered": False, "accumulate": True, "squares_c": squares, "scores_4b": scores}
    lora_linear_backward.weight_gradients(ys, x, h, h, mask, db, da.view(a.shape), group, **options)


def run_head(model: Model, dtype: torch.dtype) -> None:
    """Log-probabilities and their gradient."""
    h, w = (torch.empty(n, model.d, dtype=dtype, device="meta") for n in (TOKENS, model.vocabulary))
    target = torch.empty(TOKENS, dtype=torch.long, device="meta")
    logp, entropy, log_z = linear_logprob.forward(h, w, target, 0.9)
    linear_logprob.backward(h, w, target, logp, entropy, entropy, log_z, 0.9)
    z = torch.empty(256, model.vocabulary, dtype=dtype, device="meta")
    logp, entropy, log_z = logprob_rows.forward(z, target[:256], 0.9, True)
    logprob_rows.backward_(z, target[:256], logp, entropy, log_z, entropy, 0.9)


def run_loss(loss_type: str) -> None:
    """64 completions of up to 1,024 tokens."""
    logp, weights = torch.empty(64, 1024, device="meta"), torch.empty(64, device="meta")
    mask, advantages = torch.empty(64, 1024, dtype=torch.bool, device="meta"), torch.empty(64, 1, device="meta")
    kind, estimator = grpo_loss.kind_of(loss_type), grpo_loss.estimator_of("k3")
    surrogate = grpo_loss.Surrogate(kind, 0.2, 0.28, float("inf"), 1.0, 1.05, estimator, 0.1, True)
    grpo_loss.token_loss(logp, logp, mask, advantages, logp, logp, None, weights, surrogate)


def run_optimizer(entries: int | None) -> None:
    """One step and the norms of two matrices, of which all or so many entries train."""
    segments = [Segment("a", 0, (32, 1536), transposed=False), Segment("b", 65536, (32, 8960), transposed=True)]
    size = segments[1].offset + segments[1].numel
    index = None if entries is None else torch.arange(entries, dtype=torch.int32)
    table = segment_table(segments, index)
    param, grad, exp_avg, exp_avg_sq, clip = (torch.empty(n, device="meta") for n in (size, size, entries or size, entries or size, 1))
    index = None if index is None else index.to("meta")
    adamw_step.adamw_step(param, grad, exp_avg, exp_avg_sq, clip, table, index, 3, 1e-4, 0.9, 0.999, 1e-8, 0.0)
    adamw_step.gradient_norms(grad, table, index)


def run_export(dtype: torch.dtype) -> None:
    """One module of rank 32, padded to 64."""
    tiles = export_tiles((0,), (65536,), (32,), (1536,), (8960,), (2.0,), (64,), torch.device("meta"))
    flat, out_a, out_b = (torch.empty(n, dtype=t, device="meta") for n, t in ((400_000, torch.float32), (98304, dtype), (573440, dtype)))
    export_adapter.export_adapter(flat, tiles, out_a, out_b)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Float32 is compiled for tensor cores."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def registers(variants: Sequence[Variant]) -> dict[str, int]:
    """The most of every kernel and dtype."""
    most: dict[str, int] = {}
    for variant in variants:
        key = f"{variant.kernel} {variant.dtype}"
        most[key] = max(most.get(key, 0), variant.machine.registers)
    return most


def baselines() -> dict[str, dict[str, int]]:
    """Version of triton -> `registers` of its kernels; registers of two versions differ by more than a band of one would allow."""
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {}


def broken_limits(variants: Sequence[Variant], capability: int) -> list[str]:
    """A sentence for each: of the hardware, and of the baseline of this version of triton."""
    baseline, failures = baselines().get(triton.__version__, {}), []
    for v in variants:
        failures += hardware_faults(v, capability)
        if capability != 90:
            continue
        before = baseline.get(f"{v.kernel} {v.dtype}")
        if before is None:
            failures.append(_fault(v, "not in the baseline: --write-baseline"))
        elif v.machine.registers > before * (1 + REGISTER_BAND):
            failures.append(_fault(v, f"{v.machine.registers} registers, {before} in the baseline"))
    return failures


def hardware_faults(v: Variant, capability: int) -> list[str]:
    """A sentence for each limit of the architecture that one machine code breaks."""
    machine, matrix, (instruction, name) = v.machine, v.kernel in MATRIX_KERNELS, TENSOR_CORE[capability]
    wide = matrix or v.kernel in ("export_kernel", *cuda_gate.KERNELS)
    checks = (
        (machine.stack_bytes > 0, f"{machine.stack_bytes} bytes of stack"),
        (machine.shared_bytes > CHIPS[capability].shared_of_a_cta, f"{machine.shared_bytes} bytes of shared memory"),
        (matrix and not machine.count(instruction), f"no {name}"),
        (capability == 90 and machine.tensor_core_of_ampere > 0, f"{machine.tensor_core_of_ampere} mma.sync"),
        (capability >= 90 and wide and (v.kernel, v.dtype) not in NARROW_LOADS and not machine.wide_loads, "no TMA and no 16-byte load"),
        (machine.ctas_on_an_sm(capability) < 1, "does not fit an SM"),
    )
    return [_fault(v, what) for broken, what in checks if broken]


def _fault(v: Variant, what: str) -> str:
    return f"{v.kernel} {v.dtype} ({v.case}): {what}"


def cells(variants: Sequence[Variant], capability: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) for people."""
    header = (
        "kernel",
        "dtype",
        "registers",
        "stack",
        "shared",
        "warps",
        "CTAs/SM",
        "wgmma",
        "mma.sync",
        "TMA loads",
        "16-byte loads",
        "first case",
    )
    rows = []
    for v in variants:
        m, tma = v.machine, v.machine.count("UTMALDG")
        numbers = (m.registers, m.stack_bytes, m.shared_bytes, m.warps, m.ctas_on_an_sm(capability), m.tensor_core, m.tensor_core_of_ampere)
        rows.append((v.kernel, v.dtype, *map(str, (*numbers, tma, m.wide_loads - tma)), v.case))
    return header, rows


def page(header: Sequence[str], rows: Sequence[Sequence[str]], capability: int, path: Path, failures: Sequence[str]) -> str:
    """docs/kernels.md, docs/kernels-triton-3.6.md."""
    lines = [
        "# GPU kernels, as compiled",
        "",
        f"By `python -m bench.compile_gate --docs docs/{path.name}`: triton {triton.__version__} for sm_{capability} and "
        f"{cuda_gate.version()} for {cuda_gate.ARCHITECTURES[capability]} (the kernels of `csrc/cuda`), from the machine code. "
        "Registers and stack are of a thread, shared memory (bytes) of a CTA. **Not run on a GPU.**",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        *([] if not failures else ["", "Limits that are not kept:", "", *(f"- {failure}" for failure in failures)]),
    ]
    return "\n".join(lines) + "\n"


def summary(variants: Sequence[Variant], failures: Sequence[str]) -> dict[str, Any]:
    """The JSON object."""
    matrix = [v for v in variants if v.kernel in MATRIX_KERNELS]
    return {
        "triton": triton.__version__,
        "nvcc": cuda_gate.version(),
        "kernels": len({v.kernel for v in variants}),
        "variants": len(variants),
        "max_stack_bytes": max(v.machine.stack_bytes for v in variants),
        "max_shared_bytes": max(v.machine.shared_bytes for v in variants),
        "matrix_kernels_without_hgmma": sum(not v.machine.tensor_core for v in matrix),
        "failures": list(failures),
    }


if __name__ == "__main__":
    sys.exit(main())
