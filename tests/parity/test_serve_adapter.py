"""An exported adapter: PEFT's logits from it are those of the trainer's model, and every reader of its config computes α/r = 1."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora import serve_adapter
from fastlora.config import RunConfig
from fastlora.lora.folded import fold, read_folded
from fastlora.lora.peft_format import save_adapter
from tests.parity.file_cases import PEFT_STYLE, _load_by_peft, _logits
from tests.parity.peft_cases import SCALINGS, TARGETS, lora_config
from tests.parity.twins import Twins, make_twins
from tests.tiny import make_tiny_model
from tests.tolerances import FP32_LOGPROB

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved_run(folder: Path, targets: str, scaling: str) -> Twins:
    """A run folder whose adapter has random A and B, and the same policy in both libraries."""
    config = lora_config("llama", targets, scaling)
    twins = make_twins(make_tiny_model(), config)
    save_adapter(twins.adapter, folder / "adapter", base_model="tiny", scaling=scaling)
    (folder / "config.json").write_text(RunConfig(lora=config).model_dump_json())
    return twins


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["serve_adapter", *map(str, arguments)])
    return serve_adapter.main()


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_computes_the_trainers_logits(targets: str, scaling: str, tmp_path: Path) -> None:
    twins = saved_run(tmp_path / "run", targets, scaling)
    serve_adapter.export(tmp_path / "run", tmp_path / "out", torch.float32)
    model = make_tiny_model()
    exported, trained = _logits(_load_by_peft(model, tmp_path / "out")), _logits(twins.ours)
    assert error(exported, trained) <= FP32_LOGPROB
    assert error(exported, _logits(_load_by_peft(model, tmp_path / "run" / "adapter"))) <= FP32_LOGPROB
    assert error(_logits(model), trained) > 100 * FP32_LOGPROB, "the adapter does nothing"


def test_an_adapter_that_peft_saved_with_its_own_patterns(tmp_path: Path) -> None:
    model = make_tiny_model()
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(PEFT_STYLE)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.normal_(std=0.05, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    serve_adapter.export(tmp_path / "theirs", tmp_path / "out", torch.float32)
    assert error(_logits(_load_by_peft(model, tmp_path / "out")), _logits(theirs)) <= FP32_LOGPROB


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_reader_that_ignores_patterns_computes_the_same(scaling: str, tmp_path: Path) -> None:
    """vLLM up to 0.31: one lora_alpha / r for all modules, ranks from the tensors."""
    twins = saved_run(tmp_path / "run", "uneven ranks", scaling)
    serve_adapter.export(tmp_path / "run", tmp_path / "out", torch.float32)
    config, tensors = json.loads((tmp_path / "out" / CONFIG).read_text()), load_file(tmp_path / "out" / WEIGHTS)
    assert config["lora_alpha"] / config["r"] == 1.0 and config["r"] == max(s.rank for s in twins.adapter.slots.values())
    assert not config["use_rslora"] and "layers.0.self_attn.k_proj" not in "".join(tensors)  # rank 0 is absent
    for name, slot in twins.adapter.slots.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        delta = slot.scale * twins.adapter.b_rn(name).double().t() @ twins.adapter.a_rd(name).double()
        assert bool(((b @ a - delta).abs() <= 2.1 * 2**-24 * (b.abs() @ a.abs())).all())  # s is rounded to float32, and s B


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make setup-vllm`")
def test_vllms_own_reader_computes_scale_1_for_every_module(tmp_path: Path) -> None:
    """In a process of its own: vLLM's import changes torch's settings."""
    for scaling in SCALINGS:
        saved_run(run := tmp_path / scaling.replace("/", "-"), "uneven ranks", scaling)
        serve_adapter.export(run, run / "out", torch.float32)
    script = """
import json, sys
from pathlib import Path
from safetensors import safe_open
from vllm.lora.peft_helper import PEFTHelper
for folder in map(Path, sys.argv[1:]):
    helper = PEFTHelper.from_local_dir(str(folder), None)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        rows = {key: file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key}
    names = {key: key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in rows}
    print(json.dumps([[*helper.get_rank_and_scaling(names[key]), rows[key]] for key in rows]))
"""
    runs = sorted(path for path in tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", script, *(str(run / "out") for run in runs)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(lines) == len(SCALINGS)
    for found in lines:
        assert {scale for _, scale, _ in found} == {1.0} and {rank for rank, _, _ in found} == {1, 3, 5, 17, 64}
        assert all(rank == rows for rank, _, rows in found)


def test_round_trip(tmp_path: Path) -> None:
    """What is exported can be exported again, and stays the same to the bit; bfloat16 is rounded once."""
    twins = saved_run(tmp_path / "run", "uneven ranks", "alpha/sqrt(r)")
    first, base = serve_adapter.export(tmp_path / "run", tmp_path / "first", torch.float32)
    serve_adapter.export(tmp_path / "first", tmp_path / "second", torch.float32)
    (tmp_path / "empty").mkdir()
    serve_adapter.export(tmp_path / "first", tmp_path / "empty", torch.bfloat16)
    assert base == "tiny"
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()
    }
    half = load_file(tmp_path / "empty" / WEIGHTS)
    folded = fold(twins.adapter, torch.bfloat16)  # what the vLLM sampler sends
    for name, a_rd in read_folded(tmp_path / "first")[0].a_rd.items():
        assert torch.equal(a_rd, first.a_rd[name]) and torch.equal(half[f"base_model.model.{name}.lora_A.weight"], folded.a_rd[name])
        assert torch.equal(half[f"base_model.model.{name}.lora_B.weight"], folded.b_nr[name])


def test_the_command_says_how_to_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved_run(tmp_path / "run", "q and v only", "constant")
    assert run_command(monkeypatch, tmp_path / "run", tmp_path / "my adapter") == 0
    shown = capsys.readouterr().out
    assert "4 modules, ranks 3 to 3, float32, scales in B" in shown
    assert f"vllm serve tiny --enable-lora --max-lora-rank 8 --lora-modules 'my adapter'='{tmp_path / 'my adapter'}'" in shown
    assert "python -m vllm.entrypoints.openai.api_server --model tiny --enable-lora --max-lora-rank 8" in shown
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('tiny'), '{tmp_path / 'my adapter'}')" in shown
    assert "not for vLLM: the adapter's largest rank is 513" in next(serve_adapter.usage([3, 513], "tiny", tmp_path))
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, "--help")
    assert stopped.value.code == 0 and "every vLLM and every PEFT compute alike" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved_run(run := tmp_path / "run", "one module", "alpha/r")
    (full := tmp_path / "full").mkdir()
    (full / "config.json").write_text(RunConfig(method="full").model_dump_json())
    (stopped := tmp_path / "stopped").mkdir()
    (stopped / "config.json").write_text((run / "config.json").read_text())
    (empty := tmp_path / "rank-0").mkdir()
    (empty / CONFIG).write_text((run / "adapter" / CONFIG).read_text())
    save_file({}, empty / WEIGHTS)
    (taken := tmp_path / "taken").mkdir()
    (taken / "file").touch()
    new = tmp_path / "new"
    for source, out, message in (
        (run, taken, "taken exists and is not empty; nothing is overwritten"),
        (run, taken / "file", "file exists and is not empty"),
        (tmp_path / "nowhere", new, f"no {CONFIG}; give the folder of a saved adapter"),
        (full, new, "trained every weight (method = 'full'): there is no adapter; serve the model in"),
        (stopped, new, "has no adapter yet, it is written at the end: python train.py --resume"),
        (empty, new, "no module of the adapter has a rank above 0; there is nothing to export"),
    ):
        assert run_command(monkeypatch, source, out) == 1
        assert message in capsys.readouterr().out, message
    assert not new.exists() and [path.name for path in taken.iterdir()] == ["file"]
