"""The engine's process: vLLM's own server, with one route more, which dies with the trainer.

    python -m fastlora.rollout.vllm.serve FD FOLDERS [vLLM's flags]

FD is the read end of a pipe that the trainer holds open. It ends when the trainer does, however that happens (SIGKILL and power cords
run no handler), and then this process takes its whole group with it, server, engine core and worker, and removes FOLDERS (separated as in
PATH): what the trainer had on tmpfs.

The route, POST /fastlora/sample, takes all prompts of a rollout at once and hands them to the engine in their order, while it is paused and
its prefix cache is empty. Requests that arrive one by one are batched as they come, GEMMs of other shapes round differently, and the
same seeds give other bits the next time. Its answer is JSON with a blank line before it for every HEARTBEAT_SECONDS in which the engine's
core was alive, so that a rollout of an hour is no engine that hangs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

HEARTBEAT_SECONDS = 5.0


def _die_with(pipe: int, folders: list[str]) -> None:
    os.read(pipe, 1)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _add_route(app: Any) -> Any:
    from fastapi.responses import StreamingResponse
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.utils import random_uuid

    async def sample(body: dict[str, Any]) -> StreamingResponse:
        """{model, prompts, seeds, params} -> {model, samples}: per prompt and sample, token ids, log-probabilities, finish reason."""
        lora = app.state.openai_serving_models.lora_requests.get(body["model"])
        if lora is None and not app.state.openai_serving_models.is_base_model(body["model"]):
            raise KeyError(f"no adapter {body['model']}")
        return StreamingResponse(alive_until(asyncio.ensure_future(answer(body, lora))), media_type="application/json")

    async def alive_until(answered: asyncio.Future[bytes]) -> AsyncIterator[bytes]:
        while not (await asyncio.wait([answered], timeout=HEARTBEAT_SECONDS))[0]:
            await app.state.engine_client.is_sleeping()  # which the core answers between two of its steps; one that hangs does not
            yield b"\n"
        yield answered.result()

    async def answer(body: dict[str, Any], lora: Any) -> bytes:
        engine = app.state.engine_client
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            outputs = [
                await engine.add_request(
                    random_uuid(),
                    {"prompt_token_ids": prompt},
                    SamplingParams(**body["params"], seed=seed, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY),
                    lora_request=lora,
                )
                for prompt, seed in zip(body["prompts"], body["seeds"], strict=True)
            ]
        finally:
            await engine.resume_generation()
        results: list[RequestOutput] = await asyncio.gather(*(output.get() for output in outputs))
        model = body["model"] if lora is None else lora.lora_name
        return json.dumps({"model": model, "samples": [_samples(result) for result in results]}, allow_nan=False).encode()

    app.post("/fastlora/sample")(sample)
    return app


def _samples(result: Any) -> list[dict[str, Any]]:
    return [
        {
            "token_ids": list(one.token_ids),
            "logprobs": [logprobs[token].logprob for token, logprobs in zip(one.token_ids, one.logprobs, strict=True)],
            "finish_reason": one.finish_reason,
        }
        for one in sorted(result.outputs, key=lambda one: one.index)
    ]


def main() -> None:
    """Watches the pipe and serves."""
    pipe, folders = int(sys.argv.pop(1)), sys.argv.pop(1).split(os.pathsep)
    threading.Thread(target=_die_with, args=(pipe, folders), daemon=True).start()
    from vllm.entrypoints.launchers.api_server import entry  # after the watch: this import takes ten seconds

    build_app = entry.build_app
    entry.build_app = lambda *args: _add_route(build_app(*args))
    entry.main()


if __name__ == "__main__":
    main()
