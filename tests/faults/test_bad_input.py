"""Every mistake a user can make gets one error that names cause and fix, and costs nothing: no traceback, no run folder, no lost run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fastlora.atomic import DiskFullError
from fastlora.metrics import RunSummary
from tests.tiny import make_tiny_tokenizer
from tests.trainer.runs import adapter_tensors, run, save_tiny_model, write_config


def output_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything printed, tyro's and rich's boxes unwrapped."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "unknown key": ({"optim.learning_rate": "1e-4"}, "optim.learning_rate: unknown key"),
    "pattern hits nothing": ({"lora.rank_pattern": "{ qq_proj = 3 }"}, "'qq_proj' matches no target module"),
    "pattern hits twice": (
        {"lora.rank_pattern": '{ q_proj = 3, "layers.0.self_attn.q_proj" = 2 }'},
        "model.layers.0.self_attn.q_proj is matched by two keys",
    ),
    "rank budget missed": ({"lora.rank_budget": "49"}, "lora.rank_budget = 49 is missed: the 14 target modules come to 48 (-1)"),
    "parameter budget missed": ({"lora.parameter_budget": "6721"}, "lora.parameter_budget = 6,721 is missed"),
    "negative rank": ({"lora.r": "-1"}, "lora.r: Input should be greater than or equal to 0"),
    "huge rank": ({"lora.r": "100000"}, "lora.r: Input should be less than or equal to 1024"),
    "rank above the widths": ({"lora.r": "200"}, "rank 200 of model.layers.0.self_attn"),
    "no such projection": ({"lora.target_modules": '["c_attn"]', "lora.rank_pattern": "{}"}, "'c_attn' matches no linear module"),
    "data file missing": ({"data.source": '"nowhere.jsonl"'}, "nowhere.jsonl"),
    "context too short": ({"rollout.max_completion_length": "250"}, "256"),
    "prompt too long": ({"data.max_prompt_length": "20"}, "data.max_prompt_length"),
    "group of one": ({"rollout.num_generations": "1"}, "a group of one has no spread"),
    "uneven micro-batches": ({"trainer.gradient_accumulation_steps": "3"}, "cannot be split into 3 equal micro-batches"),
    "unknown reward": ({"reward.functions": '["outcme"]'}, "outcome"),
    "model missing": ({"model.name": '"nowhere/nothing"'}, "model 'nowhere/nothing' could not be loaded"),
    "mask missing": ({"lora.b_mask": '"nowhere.safetensors"'}, "nowhere.safetensors"),
    "kernels of a GPU": ({"model.device": '"cpu"', "trainer.implementation": '"triton"'}, "'triton' cannot run: it runs on a GPU"),
    "replay folder missing": ({"rollout.sampler": '"replay"', "rollout.replay_path": '"nowhere"'}, "holds no rollout-*.safetensors"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_impossible_setting(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, words = SETTINGS[case]
    assert run(write_config(tmp_path, **changes), "--name", "a") in (1, 2)
    assert words in output_of(capsys)
    assert not (tmp_path / "runs").exists(), "a run folder was made for a run that could not start"


def without_answer(path: Path) -> None:
    path.write_text(json.dumps({"question": "1+1="}) + "\n")


def broken_line(path: Path) -> None:
    path.write_text(json.dumps({"question": "1+1=", "answer": "2"}) + '\n{"question": "1+2=", \n')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text(""), "problems.jsonl"),
        (broken_line, "line 2"),
        (without_answer, "answer"),
    ],
    ids=["empty", "malformed line", "missing column"],
)
def test_unusable_data_file(damage: Callable[[Path], object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    damage(tmp_path / "problems.jsonl")
    assert run(config, "--name", "a") == 1
    output = output_of(capsys)
    assert "DataError" in output and "problems.jsonl" in output and words in output


def test_gold_answer_that_does_not_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "1+1=", "answer": "so it is #### 2"}\n{"question": "1+2=", "answer": "three, obviously"}\n')
    config = write_config(tmp_path, **{"data.source": '"gsm8k"', "data.train_path": f'"{path}"', "data.eval_path": f'"{path}"'})
    assert run(config, "--name", "a") == 1
    output = output_of(capsys)
    assert "gsm8k.jsonl" in output and "####" in output and "2" in output


def test_model_without_linear_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, **{"model.name": f'"{tmp_path / "gpt2"}"'})
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=131, n_positions=256)).save_pretrained(tmp_path / "gpt2")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert run(config, "--name", "a") == 1
    assert "GPT2LMHeadModel has no nn.Linear projection" in output_of(capsys)


def test_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(config, "--name", "a") == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in output_of(capsys)


def test_adapter_for_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert run(config, "--name", "small") == 0
    adapter = tmp_path / "runs" / "small" / "adapter"
    save_tiny_model(tmp_path / "wide", intermediate_size=128)
    capsys.readouterr()
    assert run(config, "--name", "wide", "--model.name", str(tmp_path / "wide"), "--lora.init-from", str(adapter)) == 1
    output = output_of(capsys)
    assert "model.layers.0.mlp" in output and "(96, 3)" not in output and "shape" in output


def test_existing_run_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert run(config, "--name", "a") == 0
    before = adapter_tensors(tmp_path / "runs" / "a")
    assert run(config, "--name", "a") == 2
    assert "--resume" in output_of(capsys)
    after = adapter_tensors(tmp_path / "runs" / "a")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run that ended at step 3 of 6 by a full disk, with checkpoints of steps 1 and 2."""
    import fastlora.trainer as trainer

    save = trainer.save_checkpoint

    def full_at_step_3(run_dir: Path, *, step: int, **rest: object) -> Path:
        if step == 3:
            raise DiskFullError(f"{run_dir}: no space left on the disk")
        return save(run_dir, step=step, **rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", full_at_step_3)
        config = write_config(tmp_path, **{"trainer.checkpoint_every": "1", "trainer.steps": "6"})
        assert run(config, "--name", "a") == 1
    return tmp_path / "runs" / "a"


def test_full_disk_leaves_the_last_checkpoint(stopped_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of(capsys)
    assert "no space left" in output and f"--resume {stopped_run}" in output
    assert run(Path("--resume"), str(stopped_run)) == 0
    assert RunSummary.read(stopped_run).steps == 6


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_damaged_checkpoint_is_named_and_the_one_before_used_only_if_asked(
    damage: Callable[[Path], None], stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    damage(stopped_run / "checkpoints" / "step-000002" / "tensors.safetensors")
    assert run(Path("--resume"), str(stopped_run)) == 1
    output = output_of(capsys)
    assert "CheckpointError" in output and "step-000002" in output and "--resume-previous" in output
    assert run(Path("--resume"), str(stopped_run), "--resume-previous") == 0
    assert "passed over" in output_of(capsys)
    assert RunSummary.read(stopped_run).steps == 6


def test_checkpoint_of_another_config(stopped_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stopped_run / "config.json"
    config = json.loads(file.read_text())
    config["optim"]["lr"] = 5e-3
    file.write_text(json.dumps(config))
    assert run(Path("--resume"), str(stopped_run)) == 1
    assert "config" in output_of(capsys)


def test_reward_that_raises_ends_the_run_resumably(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    reward = tmp_path / "reward.py"
    good = reward.read_text()
    calls = tmp_path / "calls"
    # One call per prompt: 4 of the evaluation, 2 of the first step; the second step's first one fails, once.
    reward.write_text(
        good.replace(
            "    return",
            f"    with open({str(calls)!r}, 'a') as f: f.write('x')\n"
            f"    if len(open({str(calls)!r}).read()) == 7: raise ZeroDivisionError('planted')\n    return",
        )
    )
    assert run(config, "--name", "a") == 1
    output = output_of(capsys)
    assert "RewardError" in output and "planted" in output and "--resume" in output
    reward.write_text(good)
    assert run(Path("--resume"), str(tmp_path / "runs" / "a")) == 0
    assert RunSummary.read(tmp_path / "runs" / "a").steps == 4


def test_reward_that_always_hangs_ends_the_run_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that hangs now and then scores 0 and is counted: tests/rewards/test_sandbox.py."""
    config = write_config(tmp_path, **{"reward.timeout": "0.1"})
    (tmp_path / "reward.py").write_text("import time\ndef digits(texts, examples):\n    time.sleep(3600)\n")
    assert run(config, "--name", "a") == 1
    output = output_of(capsys)
    assert "RewardError" in output and "reward.py:digits" in output and "reward.timeout" in output


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of 1e38 makes the adapter infinite at the first step; every later one is skipped, then the run stops."""
    config = write_config(tmp_path, **{"optim.lr": "1e38", "trainer.steps": "20", "optim.max_nonfinite_steps": "2"})
    assert run(config, "--name", "a") == 1
    output = output_of(capsys)
    assert "NonFiniteError" in output and "max_nonfinite_steps = 2" in output
