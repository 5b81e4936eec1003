"""The floors of the house: who may import whom, where the big libraries may be used, and a few rules on files.

The rules are data (`FLOORS`, `CONFINED`); the checkers return "file:line: what is wrong" and are themselves tested on a small
tree with one violation of each kind.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "fastlora",
        "fastlora.alarm_config",
        "fastlora.alarms",
        "fastlora.allocator",
        "fastlora.atomic",
        "fastlora.config",
        "fastlora.errors",
        "fastlora.extension",
        "fastlora.flash_attention",
        "fastlora.flex",
        "fastlora.gradient_structure",
        "fastlora.interrupt",
        "fastlora.liger",
        "fastlora.loss_config",
        "fastlora.nf4",
        "fastlora.plugins",
        "fastlora.reward_config",
        "fastlora.section",
        "fastlora.statistics",
        "fastlora.types",
        "fastlora.vllm_config",
    ),
    ("fastlora_triton",),
    ("fastlora.ops",),
    (
        "fastlora.advantages",
        "fastlora.attention",
        "fastlora.batches",
        "fastlora.data",
        "fastlora.flat",
        "fastlora.fused_layers",
        "fastlora.gradient_profile",
        "fastlora.kv_cache",
        "fastlora.lora",
        "fastlora.losses",
        "fastlora.model",
        "fastlora.nf4_linear",
        "fastlora.optim",
        "fastlora.packaged_model",
        "fastlora.packing",
        "fastlora.policy",
        "fastlora.prompt",
        "fastlora.rewards",
        "fastlora.rollout.sampler",
    ),
    (
        "fastlora.allocation",
        "fastlora.checkpoint",
        "fastlora.evaluate",
        "fastlora.metrics",
        "fastlora.mismatch",
        "fastlora.placement",
        "fastlora.progress",
        "fastlora.rollout",
        "fastlora.run_folder",
        "fastlora.selection",
        "fastlora.turns",
    ),
    ("fastlora.build", "fastlora.memory_plan", "fastlora.objectives", "fastlora.reallocation", "fastlora.trainer"),
    (
        "fastlora.doctor",
        "fastlora.dry_run",
        "fastlora.evaluate.__main__",
        "fastlora.evaluate.adapter",
        "fastlora.evidence",
        "fastlora.probe",
        "fastlora.scoring",
        "fastlora.scoring_time",
        "fastlora.serve_adapter",
        "fastlora.session",
        "fastlora.update_time",
    ),
    ("fastlora.study",),
    ("train",),
)
"""Low to high: a module imports its own floor and those below. A new module of fastlora/ must be given a floor here."""

ANALYSIS = "fastlora.analysis"
"""Reads runs; imports what it likes, and is imported by nothing but `ANALYSIS_CALLERS`."""
ANALYSIS_CALLERS = ("fastlora.session", "fastlora.study", "train")
"""They ask about runs that are over; the training itself (trainer and below) never sees analysis."""

CONFINED: dict[str, tuple[str, ...]] = {
    "trl": ("fastlora/study/shira.py", "tests/parity", "tests/study/", "bench"),
    "peft": ("fastlora/study/harness.py", "fastlora/study/shira.py", "tests/parity", "tests/study/", "bench"),
    "lm_eval": ("fastlora/study/harness.py", "tests/study/"),
    "math_verify": ("fastlora/rewards",),
    "vllm": ("fastlora/rollout/vllm",),
    "ray": ("fastlora/study/schedule.py", "tests/study/"),
    "transformers": (
        "fastlora/attention.py",
        "fastlora/fused_layers.py",
        "fastlora/lora/",
        "fastlora/model.py",
        "fastlora/optim.py",
        "fastlora/packaged_model.py",
        "fastlora/policy.py",
        "fastlora/rollout/torch",
        "tests/",
        "bench/",
    ),
}
"""Library -> the paths (by prefix) that may import it; for type hints alone (`if TYPE_CHECKING`) anyone may."""

MAX_LINES = 600
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
PYTHON_ROOTS = ("train.py", "setup.py", "fastlora", "kernels", "bench", "tests")

MACHINE_PATH = re.compile(r"(?:^|[^\w.])(/(?:work|tmp|root|opt|home|Users|mnt)/[A-Za-z]\S*)")


def python_files(root: Path) -> Iterator[Path]:
    for name in PYTHON_ROOTS:
        path = root / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()


def module_name(root: Path, path: Path) -> str:
    """fastlora/ops/x.py -> fastlora.ops.x; kernels/ is a folder of packages, not one itself."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[parts[0] == "kernels" :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor_of(module: str) -> int | None:
    """Index into FLOORS of the longest entry that holds the module; None for one without (and for fastlora.analysis)."""
    entries = [(package, height) for height, packages in enumerate(FLOORS) for package in packages]
    holding = [(len(package), height) for package, height in entries if holds(package, module)]
    return max(holding)[1] if holding else None


def holds(package: str, module: str) -> bool:
    """`fastlora` itself is only the top package's __init__; every other entry stands for all that is in it."""
    return module == package if package == "fastlora" else is_within(module, package)


def imports(path: Path, module: str) -> Iterator[tuple[int, str, bool]]:
    """(line, imported module, for type hints only) of every import, those inside functions and import_module("x") included.

    `from a import b` gives a.b: whether b is a module or a name in a, the prefix a tells its floor.
    """
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            yield node.lineno, name, node in typing_only


def floor_faults(root: Path) -> list[str]:
    """Imports that go up, and modules of fastlora/ without a floor."""
    faults = []
    for path in python_files(root):
        module = module_name(root, path)
        if not module.startswith(("fastlora", "train")) or is_within(module, ANALYSIS):
            continue
        where, floor = path.relative_to(root), floor_of(module)
        if floor is None:
            faults.append(f"{where}:1: {module} has no floor: add it to FLOORS in tests/test_import_floors.py")
            continue
        for line, imported, _ in imports(path, module):
            if is_within(imported, ANALYSIS):
                if not any(is_within(module, caller) for caller in ANALYSIS_CALLERS):
                    faults.append(f"{where}:{line}: {imported}: analysis reads runs, training never imports it")
            elif (height := floor_of(imported)) is not None and height > floor:
                faults.append(f"{where}:{line}: {imported} is on a higher floor than {module}")
    return faults


def confinement_faults(root: Path) -> list[str]:
    """Uses of a library outside the places that may use it."""
    faults = []
    for path in python_files(root):
        where = path.relative_to(root).as_posix()
        for line, imported, typing_only in imports(path, module_name(root, path)):
            allowed = CONFINED.get(imported.split(".")[0])
            if allowed is not None and not typing_only and not where.startswith(allowed):
                faults.append(f"{where}:{line}: {imported.split('.')[0]} may only be imported in {', '.join(allowed)}")
    return faults


def file_faults(root: Path, files: list[str]) -> list[str]:
    """Files too long for one subject, paths of one machine, and a kernels/ that is a package."""
    faults = []
    if (root / "kernels" / "__init__.py").exists():
        faults.append("kernels/__init__.py:1: kernels/ as a package shadows Hugging Face's `kernels` and breaks transformers")
    for name in files:
        try:
            lines = (root / name).read_text().splitlines()
        except UnicodeDecodeError:
            continue  # an image or another binary
        if name.endswith(SOURCE_SUFFIXES) and len(lines) > MAX_LINES:
            faults.append(f"{name}:{MAX_LINES + 1}: {len(lines)} lines, at most {MAX_LINES}: split it by subject")
        for number, line in enumerate(lines, 1):
            if found := MACHINE_PATH.search(line):
                faults.append(f"{name}:{number}: path of one machine: {found[1]}")
    return faults


def test_imports_go_down() -> None:
    assert floor_faults(REPOSITORY) == []


def test_libraries_stay_in_their_rooms() -> None:
    assert confinement_faults(REPOSITORY) == []


def test_files() -> None:
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: the committed files are not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert file_faults(REPOSITORY, [name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()]) == []


def tree(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return list(files)


GOOD_TREE = {
    "train.py": "import fastlora.trainer\nfrom fastlora.analysis import report\n",
    "fastlora/__init__.py": "",
    "fastlora/config.py": "import tomllib\n",
    "fastlora/ops/__init__.py": "",
    "fastlora/ops/registry.py": "import fastlora_triton\n",
    "fastlora/ops/adamw.py": "from .registry import count\nfrom ..types import Rollout\n",
    "fastlora/rewards/outcome.py": "import math_verify\nfrom fastlora import config\n",
    "fastlora/data.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import AutoModel\n",
    "fastlora/trainer.py": "from fastlora.rollout.torch import sample\nfrom fastlora.ops import adamw\n",
    "fastlora/analysis/profile.py": "from fastlora.trainer import Trainer\n",
    "fastlora/rollout/torch.py": "from transformers import DynamicCache\n",
    "fastlora/rollout/vllm/engine.py": "import vllm\n",
    "kernels/fastlora_triton/__init__.py": "import triton\n",
    "tests/parity/test_x.py": "import peft, trl\n",
    "bench/x.py": "import trl\n",
    "README.md": "~/.cache/fastlora, ./runs/x, https://host/work/x, a/tmp/b\n",
}


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (
            "fastlora/config.py",
            "\nfrom fastlora.ops import registry",
            "fastlora/config.py:2: fastlora.ops.registry is on a higher",
        ),
        ("fastlora/config.py", "from fastlora import trainer", "fastlora/config.py:1: fastlora.trainer is on a higher floor"),
        ("fastlora/ops/x.py", "from ..optim import AdamW", "fastlora/ops/x.py:1: fastlora.optim.AdamW is on a higher floor"),
        ("fastlora/ops/__init__.py", "from ..lora import x", "fastlora/ops/__init__.py:1: fastlora.lora.x is on a higher"),
        ("fastlora/losses/x.py", "def f():\n  import fastlora.rollout", "fastlora/losses/x.py:2: fastlora.rollout is on a"),
        (
            "fastlora/optim.py",
            "import importlib\nimportlib.import_module('train')",
            "fastlora/optim.py:2: train is on a higher",
        ),
        ("kernels/fastlora_triton/x.py", "import fastlora.ops", "kernels/fastlora_triton/x.py:1: fastlora.ops is on a higher"),
        ("fastlora/trainer.py", "from . import analysis", "fastlora/trainer.py:1: fastlora.analysis: analysis reads runs"),
        ("fastlora/utils.py", "", "fastlora/utils.py:1: fastlora.utils has no floor"),
        ("fastlora/optim.py", "x = 1\nimport trl.trainer", "fastlora/optim.py:2: trl may only be imported in"),
        ("tests/trainer/test_x.py", "from peft import LoraConfig", "tests/trainer/test_x.py:1: peft may only"),
        ("fastlora/advantages.py", "import math_verify as m", "fastlora/advantages.py:1: math_verify may only"),
        ("fastlora/rollout/torch.py", "import vllm", "fastlora/rollout/torch.py:1: vllm may only"),
        ("fastlora/trainer.py", "from transformers.optimization import x", "fastlora/trainer.py:1: transformers may only"),
        ("kernels/__init__.py", "", "kernels/__init__.py:1: kernels/ as a package"),
        ("csrc/cpu/x.cpp", "\n" * 601, "csrc/cpu/x.cpp:601: 601 lines"),
        ("README.md", "ok\nsee `" + "/" + "tmp/x`", "README.md:2: path of one machine: " + "/" + "tmp/x"),
        ("configs/a.toml", "path = '" + "/" + "home/me/data'", "configs/a.toml:1: path of one machine"),
    ],
)
def test_the_checkers_see_each_violation(tmp_path: Path, name: str, text: str, fault: str) -> None:
    def faults(files: list[str]) -> list[str]:
        return floor_faults(tmp_path) + confinement_faults(tmp_path) + file_faults(tmp_path, files)

    files = tree(tmp_path, GOOD_TREE)
    assert faults(files) == []
    files += [new for new in tree(tmp_path, {name: text}) if new not in files]
    assert [found[: len(fault)] for found in faults(files)] == [fault]
