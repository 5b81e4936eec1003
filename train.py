"""Train a model: from a config to a trained, evaluated, saved and resumable adapter.

    python train.py CONFIG.toml [--section.field VALUE ...]     a new run in runs/
    python train.py CONFIG.toml --dry-run                       what it would build, download and need
    python train.py --resume runs/NAME                          go on where that run stopped, to the same bits
    python train.py --resume runs/NAME --resume-previous        the same from the last intact checkpoint if the newest is damaged

Exit status: 0 done, 1 the run ended with an error, 2 the request cannot work, 3 trained but missed eval.required_gain, 4 stopped by an
alarm, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from fastlora.config import ConfigError, RunConfig, load_config
from fastlora.dry_run import dry_run
from fastlora.errors import FastloraError, StoppedByAlarmError, StoppedError
from fastlora.session import resume_run, start_run

STOPPED_BY_ALARM = 4
"""Exit status of a run that an alarm ended; it is saved and can be resumed."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig | None]:
    """The command's own flags, and the config (None when a run is resumed: its own applies)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--resume-previous", action="store_true")
    path = [argv[0]] if argv and not argv[0].startswith("-") else []
    flags, overrides = parser.parse_known_args(argv[len(path) :])
    flags.config = Path(path[0]) if path else None
    if flags.resume is None:
        return flags, load_config(flags.config, overrides, description=__doc__ or "")
    if flags.config or overrides or flags.dry_run:
        raise ConfigError("--resume continues a run under its own config: give no config file and no other setting")
    return flags, None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    console = Console()
    try:
        flags, config = parse(sys.argv[1:] if argv is None else argv)
        if config is None:
            return resume_run(flags.resume, console, allow_previous=flags.resume_previous)
        if flags.dry_run:
            return dry_run(config, console)
        return start_run(config, flags.config, console)
    except StoppedByAlarmError as error:
        console.print("[bold red]Stopped by an alarm:[/] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return STOPPED_BY_ALARM
    except StoppedError as error:
        console.print(f"[bold yellow]Stopped:[/] {error}", highlight=False)
        return 130
    except FastloraError as error:
        console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main())
