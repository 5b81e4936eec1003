"""Users' functions by `path/to/file.py:function`: they load, and every way of not loading is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlora.config import ConfigError
from fastlora.plugins import is_function_spec, load_function, load_strategy

FILE = """
from dataclasses import dataclass

NUMBER = 3

@dataclass
class Pair:
    first: "int"

def double(x):
    return 2 * Pair(x).first
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


def test_a_function_is_loaded(file: Path) -> None:
    assert load_function(f"{file}:double", "study.strategy")(21) == 42


def test_a_path_may_hold_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "own.py").write_text(FILE)
    assert load_function(f"{folder / 'own.py'}:double", "x")(1) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("double", "'double' is not written path/to/file.py:function"),
        ("own.py", "'own.py' is not written"),
        ("{folder}/own.py:", "is not written"),
        ("{folder}/own.txt:double", "is not written"),
        ("{folder}/none.py:double", "no such file as .*none.py"),
        ("{folder}:double", "is not written"),
        ("{folder}/own.py:doubel", "own.py has no doubel; did you mean double"),
        ("{folder}/own.py:zzz", "own.py has no zzz$"),
        ("{folder}/own.py:NUMBER", "NUMBER is a int, a function is needed"),
        ("{folder}/raises.py:double", r"the file raised ZeroDivisionError: division by zero \(line 2\)"),
        ("{folder}/syntax.py:double", r"the file raised SyntaxError: .*\(line 2\)"),
        ("{folder}/imports.py:double", r"the file raised ModuleNotFoundError: No module named 'no_such_library' \(line 1\)"),
    ],
)
def test_what_does_not_load_is_named(file: Path, spec: str, message: str) -> None:
    (file.parent / "raises.py").write_text("x = 1\ny = x / 0\n")
    (file.parent / "syntax.py").write_text("x = 1\ndef (\n")
    (file.parent / "imports.py").write_text("import no_such_library\n")
    with pytest.raises(ConfigError, match=rf"^study\.strategy: .*{message}"):
        load_function(spec.format(folder=file.parent), "study.strategy")


def test_a_strategy_is_built_in_or_ones_own(file: Path) -> None:
    assert load_strategy("uniform", ("uniform", "random"), "s") is None
    own = load_strategy(f"{file}:double", ("uniform", "random"), "s")
    assert own is not None
    assert own(2) == 4
    with pytest.raises(ConfigError, match=r"^s: 'unifrom' is unknown; did you mean uniform\?"):
        load_strategy("unifrom", ("uniform", "random"), "s")
    with pytest.raises(ConfigError, match=r"^s: 'zzz' is unknown; built in are uniform, random;"):
        load_strategy("zzz", ("uniform", "random"), "s")


def test_a_built_in_name_is_no_spec() -> None:
    assert [is_function_spec(text) for text in ("shuffled-proportional", "a.py:f", "a.py:", "a/b.py", ":f")] == [False, True, *[False] * 3]
