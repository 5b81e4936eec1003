"""Cells on Ray: a stage at a time, as many together as the resources allow, retried within a bound, finished ones never again.

    waiting ─► running ─► finished            finished.json is there: kept for good
                  │ process died, unexpected error: back to waiting, at most max_retries times
                  └─► failed                  named, with the end of its log, when every other cell of the stage is done

Ray starts processes and counts CPUs and GPUs; what a cell is, whether it is done, how often it was tried is ours and lies in files. Ray's
own retries are off; a worker of its own forks a process for each cell (forked.py). On a cluster every machine must see the checkout and the
output folder under the same path.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import fastlora
from fastlora.atomic import atomic_write_text
from fastlora.config import ConfigError
from fastlora.errors import FastloraError
from fastlora.interrupt import Interrupted, interruptible
from fastlora.study.cells import Cell, add_names
from fastlora.study.config import ResourcesConfig
from fastlora.study.forked import run_forked
from fastlora.study.progress import Job, StageProgress
from fastlora.study.worker import ATTEMPT_FILE, FINISHED_FILE, LOG_FILE, Outcome

if TYPE_CHECKING:
    from rich.console import Console

CELLS_FOLDER, CELLS_FILE = "cells", "cells.json"

POLL_SECONDS = 0.5
"""Between two looks at cells, files and the keyboard."""

OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest is 75 MiB; what goes through it are configs. Its default is a third of the memory."""

TAIL_LINES = 15
"""Of a failed cell's log, in the error."""


class StudyError(FastloraError):
    """Cells failed, or Ray is not there; the message names them and says how to go on."""


class StudyStoppedError(FastloraError):
    """Ctrl-C: running cells have saved themselves, finished ones are kept."""


@contextmanager
def ray_running(address: str | None) -> Iterator[ModuleType]:
    """Ray, started on this machine (address None) or joined; as it is where it runs already. Ended on leaving, if started here."""
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    local = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise StudyError(f"--ray-address {address}: no Ray answers there ({error}); start one with `ray start --head`") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> ModuleType:
    # Read while Ray is imported: no reports to its makers; no messages of dead workers on stdout, we name the cells.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise StudyError(
            "studies are scheduled by Ray, which is not installed: pip install 'ray>=2.60', or fastlora's extra `study`"
        ) from None
    return ray


class Scheduler:
    """Runs the cells of a study in OUT/cells/KEY/. One process at a time may do so (`locked`)."""

    def __init__(self, ray: ModuleType, out: Path, resources: ResourcesConfig, max_retries: int, console: Console) -> None:
        self._ray, self._out, self._resources, self._max_retries, self._console = ray, out, resources, max_retries, console
        self._keys: dict[str, str] = {}
        self._refuse_too_large()
        self._variables = {
            "PYTHONPATH": _python_path(),
            "OMP_NUM_THREADS": str(resources.cpus),  # torch takes as many threads
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # gpus = 0: none is visible; else Ray 2.60 would leave all of them
        }
        self._run_forked = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(run_forked)

    def run(self, cells: Sequence[Cell]) -> dict[str, Path]:
        """Runs a stage; returns {cell name: folder}.

        Raises ConfigError for a name that is taken; StudyError when cells failed, after all others have finished; StudyStoppedError
        after Ctrl-C (or SIGTERM), when the running cells have saved themselves.
        """
        self._keys = add_names(cells, self._keys)
        self._out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._out / CELLS_FILE, json.dumps(self._keys, indent=2) + "\n")
        folders = {cell.name: self._out / CELLS_FOLDER / self._keys[cell.name] for cell in cells}
        jobs: dict[Path, Job] = {}
        for cell in cells:
            jobs.setdefault(folders[cell.name], Job(cell, folders[cell.name]))
        for job in jobs.values():
            job.state = "finished" if (job.folder / FINISHED_FILE).exists() else "waiting"
        with self._engine([job.cell for job in jobs.values() if job.state == "waiting"]) as variables:
            self._run_jobs([*jobs.values()], variables)
        if failed := [job for job in jobs.values() if job.state == "failed"]:
            raise StudyError(self._what_failed(failed, len(jobs)))
        return folders

    @contextmanager
    def _engine(self, cells: Sequence[Cell]) -> Iterator[dict[str, str]]:
        """Inside, what the cells share runs; yields their environment's variables."""
        if self._resources.engine == "own":
            yield self._variables
            return
        nodes = self._nodes()
        if len(nodes) > 1:
            raise ConfigError(f"resources.engine = 'shared' listens on one machine, and this cluster has {len(nodes)}; set it to 'own'")
        from fastlora.study.engine import shared_engine  # torch, only where it is needed

        fits = [int(nodes[0].get(name, 0) / wanted) for name, wanted in self._wanted() if wanted]
        with shared_engine(cells, min(fits), self._out, lambda line: self._console.print(line, markup=False, soft_wrap=True)) as engine:
            yield self._variables | engine

    def _run_jobs(self, jobs: list[Job], variables: Mapping[str, str]) -> None:
        """variables: of the cells' environment."""
        run_forked = self._run_forked.options(runtime_env={"env_vars": dict(variables)})
        running: dict[Any, Job] = {}
        with StageProgress(jobs, self._console) as progress:
            try:
                with interruptible() as check_interrupt:
                    try:
                        running |= {self._start(job, run_forked): job for job in jobs if job.state == "waiting"}
                        while running:
                            self._settle(running, progress, run_forked)
                            check_interrupt()
                    except Interrupted:
                        self._stop(running, progress)
                        done = sum(job.state == "finished" for job in jobs)
                        raise StudyStoppedError(f"{done} of {len(jobs)} cells of this stage are finished, the others are saved") from None
            except KeyboardInterrupt:  # the second one
                for submitted in running:
                    self._ray.cancel(submitted, force=True)
                raise StudyStoppedError("at once: cells that ran have lost their steps since the last checkpoint") from None

    def _start(self, job: Job, run_forked: Any) -> Any:
        """Submits an attempt to Ray's `run_forked`; Ray's reference to its outcome."""
        job.attempt += 1
        job.state = "waiting"
        (job.folder / ATTEMPT_FILE).unlink(missing_ok=True)  # the worker writes it when it starts: Ray's queue may be long
        preload = not self._resources.gpus
        return run_forked.remote(job.cell, job.folder.absolute(), job.attempt, Path.cwd(), preload)

    def _settle(self, running: dict[Any, Job], progress: StageProgress, again: Any | None) -> None:
        """Waits a moment for attempts to end; books those that did and starts failed ones again by `again`, None = no more: we stop."""
        done, _ = self._ray.wait([*running], num_returns=len(running), timeout=POLL_SECONDS)
        for submitted in done:
            job = running.pop(submitted)
            outcome = self._outcome(submitted, stopping=again is None)
            job.state, job.message = outcome.state, outcome.message
            if outcome.retry and job.attempt <= self._max_retries and again is not None:
                progress.note(f"{job.cell.name}: {outcome.message}; trying again ({job.attempt} of {self._max_retries} retries)")
                running[self._start(job, again)] = job
        progress.update()

    def _outcome(self, submitted: Any, *, stopping: bool) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(submitted)
            return outcome
        except errors.TaskCancelledError:
            return Outcome("stopped")
        except errors.RayTaskError as error:
            return Outcome("failed", f"its worker could not start: {error.cause!r}", retry=True)
        except errors.RayError as error:  # killed by a signal or for memory, os._exit, its machine gone
            if stopping:
                return Outcome("stopped")
            reason = str(error).strip().partition("\n")[0]
            return Outcome("failed", f"Ray's worker died ({type(error).__name__}: {reason})", retry=True)

    def _stop(self, running: dict[Any, Job], progress: StageProgress) -> None:
        """Asks every cell to stop, as Ctrl-C asks a run (fastlora/interrupt.py), and waits until they have."""
        for submitted in running:
            self._ray.cancel(submitted, force=False, recursive=False)
        while running:
            self._settle(running, progress, None)

    def _refuse_too_large(self) -> None:
        """A cell that fits nowhere would wait for ever."""
        for resource, wanted in self._wanted():
            largest = max((node.get(resource, 0.0) for node in self._nodes()), default=0.0)
            if wanted > largest:
                raise ConfigError(
                    f"resources.{resource.lower()}s = {wanted:g}, and the largest machine has {largest:g}: no cell could ever start"
                )

    def _wanted(self) -> tuple[tuple[str, float], ...]:
        """Of a cell, in Ray's names."""
        return ("CPU", self._resources.cpus), ("GPU", self._resources.gpus)

    def _nodes(self) -> list[dict[str, float]]:
        """What each machine has, by Ray's names."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _what_failed(self, failed: list[Job], total: int) -> str:
        lines = [
            f"{len(failed)} of {total} cells failed; the others are finished and kept. The command, given again, runs what is missing."
        ]
        for job in failed:
            lines += ["", f"{job.cell.name}, attempt {job.attempt}: {job.message}", f"{job.folder / LOG_FILE} ends with:"]
            lines += [f"  {line}" for line in _tail(job.folder / LOG_FILE)]
        return "\n".join(lines)


def _python_path() -> str:
    """This checkout's fastlora and kernels before whatever the worker's machine has installed."""
    root = Path(fastlora.__file__).parents[1]
    return os.pathsep.join([str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _tail(path: Path) -> list[str]:
    if not path.exists():
        return ["(nothing: the process died before it could write)"]
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
