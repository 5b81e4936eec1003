"""Sources, gold answers, lengths, order; every kind of bad row is refused with file and line. No network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fastlora.config import DataConfig
from fastlora.data import HUB, DataError, batch_indices, epoch_order, last_boxed, load_examples
from fastlora.types import Example

SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
GSM8K_ROW = {"question": "How many?", "answer": "6 * 12 = <<6*12=72>>72\n#### 1,072"}
MATH_ROW = {"problem": "Half of $1$?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"}


def load(tokenizer: PreTrainedTokenizerFast, config: DataConfig, split: str = "train", **changes: Any) -> tuple[Example, ...]:
    arguments = {"size": 0, "seed": 0, "context_length": 4096, "max_completion_length": 16, **changes}
    return load_examples(config, split, tokenizer=tokenizer, **arguments)  # type: ignore[arg-type]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# reasoning-gym


def test_shipped_prompt_is_the_teachable_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(options=SUMS, user_template="What is {expression}?", assistant_prefix="{expression} =")
    for index, example in enumerate(load(tiny_tokenizer, config, size=20)):
        e = example.metadata["expression"]
        assert example.prompt == f"<|im_start|>user\nWhat is {e}?<|im_end|>\n<|im_start|>assistant\n{e} ="
        assert (example.index, int(example.answer)) == (index, eval(e))


def test_splits_share_no_question_whatever_the_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(options=SUMS)
    held_out = [example.prompt for example in load(tiny_tokenizer, config, "eval", size=200)]
    assert len(set(held_out)) == 200
    for seed in (0, 1):
        train = [example.prompt for example in load(tiny_tokenizer, config, size=1000, seed=seed)]
        assert len(train) == 1000
        assert not set(train) & set(held_out)


def test_held_out_problems_are_fixed_and_training_ones_follow_the_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(options=SUMS)
    assert load(tiny_tokenizer, config, "eval", size=30, seed=1) == load(tiny_tokenizer, config, "eval", size=40, seed=2)[:30]
    first, again, other = (load(tiny_tokenizer, config, size=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    # reasoning-gym's own seeds 0 and 1 give the same problems one place along; ours must not
    shared = Counter(example.prompt for example in first) & Counter(example.prompt for example in other)
    assert shared.total() < 25


@pytest.mark.parametrize(
    ("source", "options", "size", "message"),
    [
        ("reasoning_gym:chain_sums", {}, 5, "no such task; did you mean chain_sum"),
        ("reasoning_gym:chain_sum", {"terms": 2}, 5, "chain_sum has no option terms; it has .*min_terms"),
        ("reasoning_gym:chain_sum", {"seed": 2}, 5, "chain_sum has no option seed"),
        ("reasoning_gym:chain_sum", {"min_terms": 9}, 5, r"\{'min_terms': 9\}: chain_sum refuses them: max_terms must be"),
        (
            "reasoning_gym:chain_sum",
            {**SUMS, "max_digits": 1},
            500,
            r"only \d+ of 500 eval questions found; make the task larger",
        ),
        ("reasoning_gym:rubiks_cube", {}, 1, "this task has no single gold answer"),
        ("reasoning_gym:chain_sum", {}, 0, "0 = all is impossible"),
    ],
)
def test_reasoning_gym_mistakes(
    tiny_tokenizer: PreTrainedTokenizerFast, source: str, options: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, DataConfig(source=source, options=options), "eval", size=size)


# files and the hub


def test_gsm8k_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source="gsm8k", train_path=write(tmp_path / "train.jsonl", [GSM8K_ROW, "", GSM8K_ROW, GSM8K_ROW]))
    examples = load(tiny_tokenizer, config, size=2)
    assert [(e.index, e.answer, e.completion) for e in examples] == [(i, "1,072", GSM8K_ROW["answer"]) for i in range(2)]
    assert examples[0].prompt == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert len(load(tiny_tokenizer, config)) == len(load(tiny_tokenizer, config, size=100)) == 3


def test_math_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [MATH_ROW, {**MATH_ROW, "answer": "0.5"}]
    config = DataConfig(source="math", eval_path=write(tmp_path / "e.jsonl", rows), user_template="{level}: {problem}")
    examples = load(tiny_tokenizer, config, "eval")
    assert [example.answer for example in examples] == [r"\frac{1}{2}", "0.5"]
    assert examples[0].completion == MATH_ROW["solution"]
    assert "<|im_start|>user\nLevel 1: Half of $1$?<|im_end|>" in examples[0].prompt


def test_own_file(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"q": "2 {+} 2", "gold": 4, "hint": [1]}])
    config = DataConfig(source=str(path), eval_path=path, prompt_column="q", answer_column="gold", user_template="{q} {hint}")
    for split in ("train", "eval"):
        [example] = load(tiny_tokenizer, config, split)
        assert "user\n2 {+} 2 [1]<" in example.prompt
        assert (example.answer, example.completion) == ("4", "4")
        assert example.metadata == {"q": "2 {+} 2", "hint": [1]}


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        ("own", [], "train.jsonl: the data file is empty"),
        ("own", ["", " "], "train.jsonl: the data file is empty"),
        ("own", [{"question": "a", "answer": "b"}, "", '{"question": "a", '], "train.jsonl line 3: not valid JSON"),
        ("own", ["[1]"], r"train.jsonl line 1: a list where an object"),
        ("own", [{"question": "a", "gold": "b"}], "line 1: no column 'answer'; the row has gold, question"),
        ("own", [{"question": None, "answer": "b"}], "line 1: column 'question' holds None, not text"),
        ("own", [{"question": "a", "answer": True}], "line 1: column 'answer' holds True, not text"),
        (
            "gsm8k",
            [GSM8K_ROW, {"question": "a", "answer": "72"}],
            "line 2: the answer does not end in a line `#### NUMBER`: '72'",
        ),
        ("gsm8k", [{"question": "a", "answer": "72\n#### many"}], "line 1: the answer does not end in a line `#### NUMBER`"),
        ("gsm8k", [MATH_ROW], "line 1: no column 'answer'; the row has level, problem, solution"),
        ("math", [MATH_ROW, {"problem": "a", "solution": "it is 7"}], r"line 2: the solution has no \\boxed.* 'it is 7'"),
        ("math", [{"problem": "a", "solution": r"\boxed{7"}], r"line 1: the solution has no \\boxed"),
    ],
)
def test_bad_files_are_named_with_the_line(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, source: str, rows: list[object], message: str
) -> None:
    path = write(tmp_path / "train.jsonl", rows)
    config = DataConfig(source=str(path)) if source == "own" else DataConfig(source=source, train_path=path)
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, config)


def test_bytes_that_are_no_text_are_named_with_the_line(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "\xff", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl line 2: not valid JSON: .*utf-8"):
        load(tiny_tokenizer, DataConfig(source=str(tmp_path / "x.jsonl")))


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"source": "gsk8m"}, "train", "data.source = 'gsk8m' is unknown; did you mean gsm8k"),
        ({"source": "missing.jsonl"}, "train", "missing.jsonl: no such data file"),
        ({"source": "gsm8k", "train_path": "missing.jsonl"}, "train", "missing.jsonl: no such data file"),
        ({"source": "own.jsonl"}, "eval", "own.jsonl has no held-out split; set data.eval_path"),
        ({"source": "own.jsonl", "train_path": "other.jsonl"}, "train", "both name training data"),
        ({"source": "gsm8k", "options": {"min_terms": 2}}, "train", "has no effect: only reasoning_gym"),
        ({"eval_path": "e.jsonl"}, "eval", "have no effect with reasoning_gym:chain_sum"),
    ],
)
def test_settings_that_do_not_fit(tiny_tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tiny_tokenizer, DataConfig(**settings), split, size=5)


def test_hub_rows_and_an_unreachable_hub(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(name: str, configuration: str, split: str) -> list[dict[str, str]]:
        assert (name, configuration, split) == HUB["gsm8k", "eval"]
        return [GSM8K_ROW, {"question": "a", "answer": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", serve)
    assert load(tiny_tokenizer, DataConfig(source="gsm8k"), "eval", size=1)[0].answer == "1,072"
    with pytest.raises(DataError, match=r"openai/gsm8k \[test\] row 1: the answer does not end"):
        load(tiny_tokenizer, DataConfig(source="gsm8k"), "eval")
    monkeypatch.undo()  # the real client, which conftest.py keeps off the network
    with pytest.raises(DataError, match=r"cannot load openai/gsm8k .* give a local JSONL file as data\.train_path"):
        load(tiny_tokenizer, DataConfig(source="gsm8k"))


def test_all_of_maths_test_problems(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have no column `answer`, unlike MATH-500's."""

    def serve(name: str, configuration: str, split: str) -> list[dict[str, str]]:
        assert (name, split) == ("DigitalLearningGmbH/MATH-lighteval", "test")
        return [MATH_ROW]

    monkeypatch.setattr(datasets, "load_dataset", serve)
    assert load(tiny_tokenizer, DataConfig(source="math-5000"), "eval")[0].answer == r"\frac{1}{2}"
    with pytest.raises(DataError, match=r"'maths' is unknown.*math"):
        load(tiny_tokenizer, DataConfig(source="maths"))


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1}, then \boxed{ \text{a {b} c} }.", r"\text{a {b} c}"),
        (r"$\boxed 5$ apples", "5"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (r"\boxedx{1}", None),
        ("7", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


# lengths


def test_prompt_that_is_too_long(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One token per character but for the three special tokens, so lengths can be counted by hand."""
    rows = [{"question": "a", "answer": "b"}, {"question": "a" * 10, "answer": "b" * 5}]
    path = write(tmp_path / "own.jsonl", rows)
    tokens = len("|user\n" + "a" * 10 + "|\n|assistant\n")
    ample, tight = (
        DataConfig(source=str(path), max_prompt_length=tokens),
        DataConfig(source=str(path), max_prompt_length=tokens - 1),
    )
    assert len(load(tiny_tokenizer, ample, context_length=tokens + 16)) == 2
    assert len(load(tiny_tokenizer, ample, context_length=tokens + 6, max_completion_length=None)) == 2
    with pytest.raises(DataError, match=rf"line 2: the prompt has {tokens} tokens, data.max_prompt_length allows {tokens - 1}"):
        load(tiny_tokenizer, tight)
    with pytest.raises(DataError, match=rf"line 2: .* {tokens} tokens and rollout.max_completion_length = 16 exceed .* {tokens + 15} "):
        load(tiny_tokenizer, ample, context_length=tokens + 15)
    with pytest.raises(DataError, match=r"line 2: .* its completion of 6 tokens \(eos included\) exceed the model's context"):
        load(tiny_tokenizer, ample, context_length=tokens + 5, max_completion_length=None)


def test_templates_cannot_show_the_gold_answer(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", [GSM8K_ROW])
    for source in ("gsm8k", "own"):
        config = DataConfig(source="gsm8k", train_path=path) if source == "gsm8k" else DataConfig(source=str(path))
        with pytest.raises(DataError, match=r"line 1: .* asks for the field \{answer\}"):
            load(tiny_tokenizer, config.model_copy(update={"assistant_prefix": "{answer}"}))


# order


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**31), st.integers(1, 12))
def test_batches_are_the_epochs_end_to_end(num_examples: int, batch_size: int, seed: int, steps: int) -> None:
    rows = [row for step in range(steps) for row in batch_indices(step, batch_size, num_examples, seed)]
    assert len(rows) == steps * batch_size
    for start in range(0, len(rows) - num_examples + 1, num_examples):
        assert sorted(rows[start : start + num_examples]) == list(range(num_examples))


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 0, 1).tolist() == orders[1]
    assert batch_indices(7, 8, 50, 0) == tuple((orders[0] + orders[1])[56:64])
