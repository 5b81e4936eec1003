"""Many cells, one engine: a vLLM that runs beside a stage's cells, holds the adapters of as many as run together, and samples for all.

    resources.engine = "shared"     cells that sample from an adapter by vLLM share it; a cell that needs other weights has its own

It is sized for the largest cells that can run at once, started before them, watched, started again when it has died (at most
`vllm.max_restarts` times; the cells ask again meanwhile, see rollout/vllm/shared.py), and ended after them. It runs on the machine of the
command, on the GPU that `vllm.device` names (the first if none); that its memory and the cells' fit on one card together is for
resources.gpus to say. Not run on a GPU.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastlora.config import ConfigError, RunConfig
from fastlora.memory_plan import plan_load
from fastlora.model import meta_model, select_device
from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.build import engine_process
from fastlora.rollout.vllm.memory import shared_load
from fastlora.rollout.vllm.process import SOCKET, EngineProcess, memory_folder
from fastlora.rollout.vllm.servers import OwnEngine
from fastlora.rollout.vllm.shared import ENGINE_VARIABLE, can_share
from fastlora.study.cells import Cell

LOG_FILE = "engine.log"

WATCH_SECONDS = 1.0
"""Between two looks at the engine."""

Say = Callable[[str], None]


@contextmanager
def shared_engine(cells: Sequence[Cell], at_once: int, out: Path, say: Say) -> Iterator[dict[str, str]]:
    """Inside, the engine of the `cells` that can share one runs; yields what their environment must say, {} when none can.

    at_once: how many cells run together at most. out: folder of its log.

    Raises ConfigError for cells that no one engine serves; SamplerError when it does not start.
    """
    sharing = [cell for cell in cells if can_share(cell.config)]
    if not sharing:
        yield {}
        return
    configs, at_once = [cell.config for cell in sharing], min(at_once, len(sharing))
    first = configs[0]
    for cell in sharing:
        if (cell.config.model, cell.config.vllm) != (first.model, first.vllm):
            raise ConfigError(f"resources.engine = 'shared': cell {cell.name!r} has other settings in [model] or [vllm] than the first")
    folder = memory_folder()
    engine = OwnEngine(_process(configs, at_once, out / LOG_FILE, folder))
    try:
        say(f"starting one vLLM for {len(sharing)} cells, {at_once} at once; its log is {out / LOG_FILE}")
        engine.start()
        with _watched(engine, folder, first.vllm.max_restarts, say):
            yield {ENGINE_VARIABLE: str(folder)}
    finally:
        engine.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _process(configs: Sequence[RunConfig], at_once: int, log: Path, folder: Path) -> EngineProcess:
    first, model = configs[0], meta_model(configs[0].model)
    device = select_device(first.model)
    card = None if device.type == "cpu" else torch.device("cuda", first.vllm.device or 0)
    load = shared_load([plan_load(config, model, on_cpu=card is None) for config in configs], at_once)
    return engine_process(first, model.config, load, card, log=log, scratch=folder, socket=folder / SOCKET)


@contextmanager
def _watched(engine: OwnEngine, folder: Path, max_restarts: int, say: Say) -> Iterator[None]:
    """Inside, an engine that dies is started again; after `max_restarts` its folder goes, which tells the cells not to wait."""
    ended = threading.Event()

    def watch() -> None:
        left = max_restarts
        while not ended.wait(WATCH_SECONDS):
            if engine.alive() or ended.is_set():
                continue
            if not left:
                say(f"the cells' engine has died again after {max_restarts} restarts; cells that need it fail")
                shutil.rmtree(folder, ignore_errors=True)
                return
            left -= 1
            say(f"the cells' engine has died; starting it again ({max_restarts - left} of {max_restarts})")
            try:
                engine.start()
            except SamplerError as error:
                say(str(error))

    thread = threading.Thread(target=watch, name="engine-watch")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        engine.stop()  # a start that is under way ends with it
        thread.join()
