"""Problems to train and evaluate on: rows of a source -> rendered `Example`s, and the order in which a run sees them.

Sources: a reasoning-gym task, GSM8K and MATH (hub or local JSONL), one's own JSONL. Whatever is wrong with a row is a DataError
that names the file, the line and the fix, raised before a model is trained.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastlora.config import DataConfig
from fastlora.errors import FastloraError
from fastlora.prompt import PromptError, chat_renderer, encode, fill_template
from fastlora.rewards import gsm8k
from fastlora.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval"]

HUB: dict[tuple[str, Split], tuple[str, str, str]] = {
    ("gsm8k", "train"): ("openai/gsm8k", "main", "train"),
    ("gsm8k", "eval"): ("openai/gsm8k", "main", "test"),
    # The 7,500 training problems of Hendrycks et al.; MATH-500 is drawn from the 5,000 test problems, so the two are disjoint.
    ("math", "train"): ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
    ("math", "eval"): ("HuggingFaceH4/MATH-500", "default", "test"),
    # All of those test problems: 500 are too few to tell accuracies apart that differ by less than six points.
    ("math-5000", "train"): ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
    ("math-5000", "eval"): ("DigitalLearningGmbH/MATH-lighteval", "default", "test"),
}
"""(source, split) -> hub data set, configuration, hub split."""

EVAL_SHARE = 4
"""One in this many reasoning-gym questions is held out, chosen by the hash of its text."""
CHUNK = 512
"""Problems per generator; some tasks (acre) build all of theirs at once: .6 ms each, a minute for 100,000."""
MAX_BARREN_CHUNKS = 20
"""Generators in a row without one new held-out question (10,240 draws) after which a task is taken to be exhausted."""


class DataError(FastloraError):
    """Data that cannot be used; the message names the row or the setting, and the fix."""


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    """File and line, or task and draw; how an error names the row."""
    question: str
    answer: str
    completion: str
    columns: dict[str, Any]
    """All other columns but those that hold the gold answer, which no template may show to the model."""


def load_examples(
    config: DataConfig,
    split: Split,
    *,
    size: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    max_completion_length: int | None,
) -> tuple[Example, ...]:
    """The first `size` rows of a split (0 = all; a file may hold fewer), rendered and checked.

    seed: of the training problems of a reasoning-gym task; held-out problems never depend on it.
    context_length: tokens, the model's limit. max_completion_length: tokens to keep free behind each prompt; None (SFT) = the
    row's own completion and its eos.
    Raises DataError: source, file, line, column, gold answer or template unusable; a row too long.
    """
    rows = _rows(config, split, size, seed)
    try:
        render = chat_renderer(tokenizer, config.system_prompt)
    except PromptError as error:
        raise DataError(str(error)) from error
    examples = []
    for index, row in enumerate(rows):
        columns = {**row.columns, "question": row.question}
        try:
            prompt = render(fill_template(config.user_template, columns)) + fill_template(config.assistant_prefix, columns)
        except PromptError as error:
            raise DataError(f"{row.where}: {error}") from error
        examples.append(Example(index, prompt, row.answer, row.completion, row.columns, row.question))
    _check_lengths(config, rows, examples, tokenizer, context_length, max_completion_length)
    return tuple(examples)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_examples], the order of the rows in an epoch: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def batch_indices(step: int, batch_size: int, num_examples: int, seed: int) -> tuple[int, ...]:
    """Rows of generation batch `step` (from 0), `batch_size` of them.

    Batches are cut from the epochs' orders laid end to end, so each epoch shows each row once and no row is dropped; a resumed
    run needs nothing but `step`.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: epoch_order(num_examples, seed, epoch) for epoch in {p // num_examples for p in positions}}
    return tuple(int(orders[p // num_examples][p % num_examples]) for p in positions)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} (or \fbox{...}, or brace-less `\boxed 5`), braces balanced; None if there is none."""
    *_, last = chain([None], re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if last is None:
        return None
    rest = text[last.end() :]
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip() or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip() or None
    return None


def _rows(config: DataConfig, split: Split, size: int, seed: int) -> list[_Row]:
    kind, _, task = config.source.partition(":")
    path = config.train_path if split == "train" else config.eval_path
    if kind == "reasoning_gym":
        if config.train_path or config.eval_path:
            raise DataError(f"data.train_path and data.eval_path have no effect with {config.source}: it generates its problems")
        return _generated_rows(task, split, config.options, size, seed)
    if config.options:
        raise DataError(f"data.options = {config.options} has no effect: only reasoning_gym tasks have options")
    if (config.source, split) in HUB:
        parse = _gsm8k_row if config.source == "gsm8k" else _math_row
        raw = _read_jsonl(path) if path else _read_hub(config.source, split)
        return [parse(where, row) for where, row in islice(raw, size or None)]
    if Path(config.source).suffix not in (".jsonl", ".json"):
        known = [*dict.fromkeys(source for source, _ in HUB), "reasoning_gym:"]
        raise DataError(f"data.source = {config.source!r} is unknown{_near(config.source, known)}")
    if config.train_path:
        raise DataError(f"data.source = {config.source} and data.train_path = {config.train_path} both name training data; give one")
    if split == "eval" and path is None:
        raise DataError(f"data.source = {config.source} has no held-out split; set data.eval_path to a JSONL file")
    return [_own_row(where, row, config) for where, row in islice(_read_jsonl(path or Path(config.source)), size or None)]


def _generated_rows(task: str, split: Split, options: dict[str, Any], size: int, seed: int) -> list[_Row]:
    """Problems of a reasoning-gym task.

    A question belongs to the held-out split if the hash of its text says so, whatever seed drew it: the two splits can never
    share one, however many problems either has and whenever an evaluation with more of them is made. Held-out questions are
    distinct; training questions come as the task draws them.
    """
    if size == 0:
        raise DataError(f"reasoning_gym:{task} makes as many problems as it is asked for; 0 = all is impossible")
    rows: list[_Row] = []
    seen: set[str] = set()
    barren = 0
    for where, item in _draws(task, options, "eval" if split == "eval" else f"train {seed}"):
        question, barren = item["question"], barren + 1
        held_out = hashlib.sha256(question.encode()).digest()[0] % EVAL_SHARE == 0
        if held_out == (split == "eval") and question not in seen:
            if not isinstance(item["answer"], str):
                raise DataError(f"{where}: this task has no single gold answer; its problems are judged by a program of their own")
            rows.append(_Row(where, question, item["answer"], item["answer"], item["metadata"]))
            barren = 0
            if split == "eval":
                seen.add(question)
        if len(rows) == size:
            return rows
        if barren == MAX_BARREN_CHUNKS * CHUNK:
            raise DataError(
                f"reasoning_gym:{task}, data.options = {options}: only {len(rows)} of {size} {split} questions found; "
                "make the task larger (data.options) or ask for fewer (data.train_size, eval.num_problems)"
            )
    raise AssertionError("draws never end")


def _draws(task: str, options: dict[str, Any], seed_text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless (name, item) of a task.

    reasoning-gym seeds item i with seed + i, so neighbouring seeds give the same problems one place along; each chunk of ours
    has a seed of 31 random bits instead.
    """
    import reasoning_gym  # 2 s: only runs that use it pay
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"data.source = reasoning_gym:{task}: no such task{_near(task, list(DATASETS))}")
    allowed = {field.name for field in fields(DATASETS[task][1])} - {"seed", "size"}
    if unknown := sorted(set(options) - allowed):
        raise DataError(f"data.options: {task} has no option {', '.join(unknown)}; it has {', '.join(sorted(allowed))}")
    seeds = random.Random(f"fastlora {seed_text}")
    while True:
        seed = seeds.getrandbits(31)
        try:
            chunk = reasoning_gym.create_dataset(task, size=CHUNK, seed=seed, **options)
        except (AssertionError, ValueError, TypeError) as error:  # what the tasks' own validate() raise
            raise DataError(f"data.options = {options}: {task} refuses them: {error}") from error
        for i in range(CHUNK):
            yield f"reasoning_gym:{task} (seed {seed}, item {i})", chunk[i]


def _read_hub(source: str, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # 1 s: only runs that use it pay

    name, configuration, hub_split = HUB[source, split]
    try:
        table = datasets.load_dataset(name, configuration, split=hub_split)
    except OSError as error:  # ConnectionError, DatasetNotFoundError and hub errors all derive from it
        raise DataError(
            f"data.source = {source}: cannot load {name} from the Hugging Face hub ({error}); give a local JSONL file as data.{split}_path"
        ) from error
    for i, row in enumerate(table):
        yield f"{name} [{hub_split}] row {i}", row


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row) of each line that is not blank; the number counts from 1, blank lines included."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f'{where}: a {type(row).__name__} where an object {{"column": value}} is wanted')
            yield where, row
    if empty:
        raise DataError(f"{path}: the data file is empty")


def _gsm8k_row(where: str, row: dict[str, Any]) -> _Row:
    solution = _text(where, row, "answer")
    gold = gsm8k.gold_text(solution)
    if gold is None:
        raise DataError(f"{where}: the answer does not end in a line `#### NUMBER`: {solution[-80:]!r}")
    return _Row(where, _text(where, row, "question"), gold, solution, _others(row, "question", "answer"))


def _math_row(where: str, row: dict[str, Any]) -> _Row:
    solution = _text(where, row, "solution")
    gold = _text(where, row, "answer") if "answer" in row else last_boxed(solution)
    if not gold:
        raise DataError(f"{where}: the solution has no \\boxed{{...}} answer, and there is no column answer: {solution[-80:]!r}")
    question = _text(where, row, "problem")
    return _Row(where, question, gold, solution, _others(row, "answer", "solution"))


def _own_row(where: str, row: dict[str, Any], config: DataConfig) -> _Row:
    question, answer = _text(where, row, config.prompt_column), _text(where, row, config.answer_column)
    return _Row(where, question, answer, answer, _others(row, config.answer_column))


def _text(where: str, row: dict[str, Any], column: str) -> str:
    """A column that must hold text or a number."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; the row has {', '.join(sorted(row)) or 'none'}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: column {column!r} holds {value!r}, not text")
    return str(value)


def _others(row: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in left_out}


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(sorted(known))}"


def _check_lengths(
    config: DataConfig,
    rows: Sequence[_Row],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    max_completion_length: int | None,
) -> None:
    prompts = [len(ids) for ids in encode(tokenizer, [example.prompt for example in examples])]
    if max_completion_length is None:
        texts = [example.completion for example in examples]
        completions = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        behind, fix = "its completion of {} tokens (eos included)", "shorten the row"
    else:
        completions = [max_completion_length] * len(examples)
        behind, fix = "rollout.max_completion_length = {}", "lower rollout.max_completion_length or shorten the row"
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if prompt > config.max_prompt_length:
            raise DataError(
                f"{row.where}: the prompt has {prompt} tokens, data.max_prompt_length allows {config.max_prompt_length}; "
                "raise it or shorten the row"
            )
        if prompt + completion > context_length:
            raise DataError(
                f"{row.where}: the prompt's {prompt} tokens and {behind.format(completion)} exceed the model's context of "
                f"{context_length} tokens; {fix}"
            )
