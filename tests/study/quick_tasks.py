"""Tasks without a model, for the scheduler: what Ray does with processes that live, sleep, raise and die.

They run in workers that know nothing of the test, so everything they need is in their options and in the cell's folder.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlora.atomic import atomic_write_text
from fastlora.config import ConfigError, RunConfig
from fastlora.interrupt import Interrupted, interruptible
from fastlora.study.tasks import Say


def write(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Leaves one line per execution in ran.txt: seed, seconds at start and end, process. Ends when `together` cells have begun."""
    say(f"seed {config.seed}")
    start = time.time()
    time.sleep(options.get("seconds", 0.0))
    (folder / "began").touch()
    while len([*folder.parent.glob("*/began")]) < options.get("together", 1):
        if time.time() > start + 60:
            raise TimeoutError("alone after a minute")
        time.sleep(0.05)
    with (folder / "ran.txt").open("a") as file:
        file.write(f"{config.seed} {start} {time.time()} {os.getpid()}\n")


def machine(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """What a cell sees of its machine."""
    import torch

    import fastlora

    seen = {"threads": torch.get_num_threads(), "fastlora": fastlora.__file__, "name": config.name, "output_dir": str(config.output_dir)}
    (folder / "machine.json").write_text(json.dumps(seen | {"cwd": os.getcwd(), "omp": os.environ["OMP_NUM_THREADS"]}))


def peak(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Holds `mib` of memory for a moment; the process's peak as a run reports it."""
    import torch

    from fastlora.build import peak_memory_bytes

    held = bytearray(options["mib"] << 20)
    (folder / "peak").write_text(str(peak_memory_bytes(torch.device("cpu"))))
    del held


def die(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Dies without a word of its own, the first `times` times: by SIGKILL, or by os._exit(7)."""
    say("the last words")
    deaths = folder / "deaths"
    deaths.write_text(f"{deaths.read_text() if deaths.exists() else ''}x")
    if len(deaths.read_text()) <= options["times"]:
        os.kill(os.getpid(), signal.SIGKILL) if options["how"] == "kill" else os._exit(7)


def explode(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """An error that nobody foresaw."""
    with (folder / "attempts").open("a") as file:
        file.write("x")
    raise ZeroDivisionError("no luck")


def refuse(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """An error that says what to mend."""
    with (folder / "attempts").open("a") as file:
        file.write("x")
    raise ConfigError("lora.r: too large for this model")


def lose_engine(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """An error of ours that another attempt may not meet."""
    from fastlora.rollout.vllm.client import EngineGoneError

    raise EngineGoneError("the engine died")


def interrupt(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Ctrl-C in a task that has nothing to save."""
    raise KeyboardInterrupt


def count(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """Counts to trainer.steps as a run trains: a row a step, saved at every step, stopped by Ctrl-C between two steps, resumable."""
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    atomic_write_text(folder / f"began-{time.time()}", str(done))
    with interruptible() as check_interrupt:
        for step in range(done + 1, config.trainer.steps + 1):
            time.sleep(options["seconds"])
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step, "reward/mean": 0.25, "seconds/sampling": options["seconds"]}) + "\n")
            try:
                check_interrupt()
            except Interrupted:
                (folder / "saved").touch()
                raise
