"""Evaluate any adapter on a config's held-out problems: `python -m fastlora.evaluate --help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fastlora.config import RunConfig, load_config
from fastlora.errors import FastloraError
from fastlora.evaluate.adapter import evaluate_adapter
from fastlora.run_folder import open_run_folder


@dataclass(frozen=True)
class Arguments:
    """Greedy pass@1 (and pass@k if the config asks for it) on the fixed held-out problems, with 95 % intervals."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or config file (.toml): the model, the problems and the reward."""
    adapter: str | None = None
    """PEFT adapter folder, or `none` for the base model; default: the run's own adapter (base model for a config file)."""
    num_problems: int | None = None
    """Problems, the first of the held-out split; default: the config's eval.num_problems."""
    out: Path | None = None
    """JSONL file to write every answer to."""


def _config(arguments: Arguments) -> tuple[RunConfig, Path | None]:
    """The config to evaluate under, and the adapter folder (None = base model)."""
    if arguments.run.suffix == ".toml":
        config, own = load_config(arguments.run), None
    else:
        folder, config = open_run_folder(arguments.run)
        own = folder.adapter if config.method == "lora" else None
        if config.method == "full":
            config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder.model)})})
    if arguments.num_problems is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"num_problems": arguments.num_problems})})
    if arguments.adapter is None:
        return config, own
    return config, None if arguments.adapter == "none" else Path(arguments.adapter)


def main() -> int:
    """Runs the command; returns its exit status."""
    arguments = tyro.cli(Arguments, prog="python -m fastlora.evaluate", description=__doc__)
    console = Console(highlight=False, soft_wrap=True)
    try:
        config, adapter = _config(arguments)
        result = evaluate_adapter(config, adapter)
    except FastloraError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        return 1
    console.print(f"{adapter or 'base model'}: pass@1 {result.accuracy}", markup=False)
    for estimate in result.pass_at_k:
        console.print(f"{adapter or 'base model'}: pass@{estimate.k} {estimate}", markup=False)
    if arguments.out:
        result.write(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
