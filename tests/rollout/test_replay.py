"""Recorded rollouts: the same record back, and every recording that is not this run's refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.rollout.replay import RecordingSampler, ReplaySampler, read_rollout, rollout_file, write_rollout
from fastlora.rollout.sampler import SamplerError, SamplingParams, pad_left, pad_right
from fastlora.types import Example, Rollout

EXAMPLES = (Example(4, "What is 1 + 1?", "2", metadata={"terms": 2, "text": "ü"}), Example(9, "", "x", completion="y"))
PARAMS = SamplingParams(num_generations=2, max_completion_length=5)


def _rollout(version: int = 0) -> Rollout:
    ids, mask = pad_right([torch.arange(3, 3 + length) for length in (5, 1, 2, 3)], 2, torch.long)
    prompts, prompt_mask = pad_left([torch.arange(length) for length in (4, 4, 1, 1)], 2)
    logp = torch.randn(ids.shape) * mask
    finished = torch.tensor([False, True, True, True])
    return Rollout(EXAMPLES, 2, prompts, prompt_mask, ids, mask, logp, finished, ("a", "", "ü\n", "\0"), version)


class _Sampler:
    """Delivers `_rollout` and remembers what it was asked for."""

    def sample(self, examples: Sequence[Example], params: SamplingParams, *, seed: int, adapter_version: int) -> Rollout:
        self.asked = (tuple(examples), params, seed)
        return _rollout(adapter_version)


def _same(a: Rollout, b: Rollout) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout)]
    return all(torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_what_is_recorded_is_replayed(tmp_path: Path) -> None:
    """To the same record, every field; the recorder passes on what it was given and what it got."""
    inner = _Sampler()
    recorder = RecordingSampler(inner, tmp_path / "new" / "folder")
    recorded = [recorder.sample(EXAMPLES, PARAMS, seed=5 + v, adapter_version=v) for v in (0, 3)]
    assert inner.asked == (EXAMPLES, PARAMS, 8)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "rollout-000000.safetensors",
        "rollout-000003.safetensors",
    ]
    replay = ReplaySampler(tmp_path / "new" / "folder")
    for rollout in reversed(recorded):  # by version, not by order
        again = replay.sample(EXAMPLES, PARAMS, seed=99, adapter_version=rollout.adapter_version)
        assert _same(again, rollout)


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    write_rollout(_rollout(), rollout_file(tmp_path, 0))
    with pytest.raises(SamplerError, match=r"rollout-000001.safetensors: no recorded rollout; the recording has fewer steps"):
        ReplaySampler(tmp_path).sample(EXAMPLES, PARAMS, seed=0, adapter_version=1)


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_recordings_is_refused_at_once(tmp_path: Path, folder: str) -> None:
    with pytest.raises(
        SamplerError, match=r"rollout.replay_path = .* holds no rollout-\*.safetensors; record one with rollout.record_path"
    ):
        ReplaySampler(tmp_path / folder)


@pytest.mark.parametrize(
    ("examples", "params"),
    [
        (EXAMPLES[::-1], PARAMS),
        (EXAMPLES[:1], PARAMS),
        ((EXAMPLES[0], replace(EXAMPLES[1], prompt="other")), PARAMS),
        (EXAMPLES, replace(PARAMS, num_generations=4)),
    ],
    ids=["order", "fewer", "prompt", "group size"],
)
def test_a_recording_of_other_problems_is_refused(tmp_path: Path, examples: tuple[Example, ...], params: SamplingParams) -> None:
    write_rollout(_rollout(), rollout_file(tmp_path, 0))
    with pytest.raises(SamplerError, match=r"was recorded for other prompts or another rollout.num_generations"):
        ReplaySampler(tmp_path).sample(examples, params, seed=0, adapter_version=0)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = rollout_file(tmp_path, 0)
    write_rollout(_rollout(), path)
    intact = path.read_bytes()
    for content in (intact[:-3], intact[:20], b"", b"garbage" * 9, intact.replace(b'\\"texts\\"', b'\\"tests\\"')):
        path.write_bytes(content)
        with pytest.raises(SamplerError, match=r"rollout-000000.safetensors is damaged"):
            read_rollout(path)
    tensors = {"prompt_ids_np": torch.zeros(1, 1)}
    save_file(tensors, path)
    with pytest.raises(SamplerError, match="is damaged, or no recorded rollout"):
        read_rollout(path)
    save_file(tensors, path, metadata={"rollout": "{"})
    with pytest.raises(SamplerError, match="is damaged"):
        read_rollout(path)
