"""Public benchmarks on the base model or on an adapter, through lm-evaluation-harness (PyPI `lm-eval`): what training made it forget.

    model       as fastlora loads it (model.name, revision, dtype, device), and on it the adapter of lora.init_from, as PEFT loads that
    answers     lm-eval's, all of it: prompts, choice of the solved examples, log-likelihoods, greedy completions, filters
    right       a question whose score is 1 by the first metric of its task, under the task's first filter; wrong = 0

Every question keeps the hashes that lm-eval gives its document and its prompt: two models are compared on the same questions, asked in the
same words, or not at all. The log-softmax is float32: in bfloat16 a log-likelihood of −10 is a multiple of 2^-4, and choices tie.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastlora.atomic import atomic_write_text
from fastlora.config import ConfigError, RunConfig, validated
from fastlora.errors import FastloraError
from fastlora.lora.peft_format import load_adapter
from fastlora.model import BaseModel, load_base_model
from fastlora.study.config import HarnessConfig
from fastlora.study.tasks import Say

HARNESS_FILE = "harness.json"
WHERE = "layer_selection.harness"
"""What the messages call the setting."""

CODE_VARIABLE = "HF_ALLOW_CODE_EVAL"
"""Hugging Face's `code_eval`, which grades HumanEval, runs nothing unless this is 1."""

BOOTSTRAP_RESAMPLES = 100
"""For standard errors that are only reported (of f1, say): the accuracy's has a formula. lm-eval's own number is 100,000."""

HASH_DIGITS = 16
"""64 bits; in full the 14,042 questions of MMLU would take 3 MB an adapter."""


class HarnessError(FastloraError):
    """A benchmark that cannot be run, read or compared; the message names the task and the reason."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    question: str
    """Task and number in it: "mmlu_virology/3"."""
    doc_hash: str
    prompt_hash: str
    """sha256 as lm-eval makes them, of the document and of the whole prompt with its solved examples; the first HASH_DIGITS of each."""
    correct: bool


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task, or a group of tasks, as the config names it."""

    metric: str
    """What says right or wrong, and under which filter: "exact_match,strict-match"."""
    value: float
    """Fraction of the questions that are right, every question of a group counted alike."""
    stderr: float | None
    """lm-eval's; None where it gives none."""
    n: int
    num_fewshot: Sequence[int]
    """Solved examples in front of a question: one number, or several in a group whose tasks differ."""
    versions: Mapping[str, str | float]
    """Task -> version of its YAML."""
    reported: Mapping[str, float]
    """Every number that lm-eval reports, under the name that it has there."""
    items: Sequence[Item]

    @property
    def correct(self) -> list[bool]:
        """One a question, in lm-eval's order."""
        return [item.correct for item in self.items]

    @property
    def what_was_asked(self) -> tuple[object, ...]:
        """Equal for two models that may be compared."""
        return self.metric, dict(self.versions), [(item.question, item.doc_hash, item.prompt_hash) for item in self.items]


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """harness.json."""

    harness: str
    """Version of lm-eval."""
    model: str
    adapter: str | None
    tasks: Mapping[str, TaskResult]

    def write(self, folder: Path) -> None:
        """Writes `folder`/harness.json atomically."""
        atomic_write_text(folder / HARNESS_FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> HarnessResult:
        """What `write` wrote. Raises HarnessError when it is missing or damaged."""
        path = folder / HARNESS_FILE
        try:
            found = json.loads(path.read_text())
            for task in found["tasks"].values():
                task["items"] = [Item(**item) for item in task["items"]]
            return cls(**found | {"tasks": {name: TaskResult(**task) for name, task in found["tasks"].items()}})
        except FileNotFoundError:
            raise HarnessError(f"{path}: no such file; a study's harness task writes one") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HarnessError(f"{path} is damaged: {error}") from None

    def same_questions(self, other: HarnessResult, where: str) -> None:
        """Raises HarnessError unless both answered the same questions, graded by the same lm-eval."""
        if (self.harness, [*self.tasks]) != (other.harness, [*other.tasks]):
            seen = (f"lm-eval {one.harness} on {', '.join(one.tasks)}" for one in (self, other))
            raise HarnessError(f"{where}: {' and '.join(seen)} cannot be compared; run one of them again")
        for name, task in self.tasks.items():
            if task.what_was_asked != other.tasks[name].what_was_asked:
                raise HarnessError(f"{where}: {name} was asked with other questions, prompts or metrics than the base model was")


def run_harness(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: lm-eval's tasks, options as HarnessConfig, answered by the model of `config`: `folder`/harness.json.

    Raises ConfigError for options that cannot work, HarnessError (lm-eval is missing, a task is unknown or its data cannot be loaded, a
    metric that is not right or wrong), and what loading model and adapter raises.
    """
    harness, version = validated(HarnessConfig, options, WHERE), _harness_version()
    from lm_eval.evaluator import simple_evaluate

    with _code_allowed(harness.confirm_unsafe_code):  # the loading too: humaneval's own file tries `code_eval` out
        manager = _task_manager(harness)
        loaded = _load_tasks(manager, harness)  # before the model: what is not there costs no minutes
        results = simple_evaluate(
            harness_model(config, harness.batch_size),
            tasks=[part for name, parts in loaded.items() for part in _as_asked(name, parts)],
            task_manager=manager,
            limit=harness.limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES,
            confirm_run_unsafe_code=harness.confirm_unsafe_code,
        )
    tasks = {name: _task_result(name, [*parts["tasks"]], results) for name, parts in loaded.items()}
    for name, task in tasks.items():
        say(f"harness: {name}: {task.metric} {task.value:.3f}, {task.n} questions")
    adapter = config.lora.init_from
    HarnessResult(version, config.model.name, None if adapter is None else str(adapter), tasks).write(folder)


def harness_model(config: RunConfig, batch_size: int) -> Any:
    """lm-eval's HFLM of the config's base model, with lora.init_from on it. Raises HarnessError, and as loading them does."""
    from lm_eval.models.huggingface import HFLM

    model, adapter = load_base_model(config.model), config.lora.init_from
    module = model.module if adapter is None else _with_adapter(model, adapter)
    return HFLM(pretrained=module, tokenizer=model.tokenizer, batch_size=batch_size, softmax_dtype="float32")


def _with_adapter(model: BaseModel, folder: Path) -> Any:
    from peft import PeftModel

    load_adapter(folder)  # names what is damaged
    try:
        return PeftModel.from_pretrained(model.module, str(folder))
    except (ValueError, RuntimeError) as error:
        raise HarnessError(f"{folder}: PEFT cannot put this adapter on {model.source}: {error}") from error


def _harness_version() -> str:
    try:
        import lm_eval
        import peft  # noqa: F401
    except ImportError as error:
        raise HarnessError(
            f"[{WHERE}] needs lm-eval and PEFT, and {error.name} is not installed: `make setup-study`, or pip install -e '.[study]'"
        ) from None
    return str(lm_eval.__version__)


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Inside, `code_eval` runs code if `allowed`; afterwards the variable is what it was."""
    before = os.environ.get(CODE_VARIABLE)
    if allowed:
        os.environ[CODE_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CODE_VARIABLE, None)
        else:
            os.environ[CODE_VARIABLE] = before


def _task_manager(harness: HarnessConfig) -> Any:
    """lm-eval's index of tasks; its own 14,000 files, which take 7 s, are left out where `include_path` has all that is asked for."""
    from lm_eval.tasks import TaskManager

    if harness.include_path is not None:
        own = TaskManager(include_path=harness.include_path, include_defaults=False)
        if set(harness.tasks) <= set(own.all_subtasks):  # a group may name tasks that lie elsewhere
            return own
    return TaskManager(include_path=harness.include_path)


def _load_tasks(manager: Any, harness: HarnessConfig) -> dict[str, Any]:
    """Name in the config -> lm-eval's TaskDict ("tasks": the single ones, with their data; "groups"), ready to be evaluated."""
    loaded: dict[str, Any] = {}
    asked_by: dict[str, str] = {}
    for name in harness.tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise HarnessError(f"{WHERE}.tasks: lm-eval has no task {name!r}; {hint}")
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # whatever its YAML, its Python, `datasets` or the hub raise
            raise HarnessError(
                f"{WHERE}.tasks: {name!r} cannot be loaded: {type(error).__name__}: {str(error).strip() or 'no reason given'}. If its data "
                "or its metric are not on this machine, load them once where the Hugging Face hub can be reached"
            ) from error
        for one, task in loaded[name]["tasks"].items():
            if one in asked_by:
                raise ConfigError(f"{WHERE}.tasks: {one} would be answered for both {asked_by[one]} and {name}; name one of them")
            asked_by[one] = name
            _prepare(one, task, harness.num_fewshot.get(name), harness.confirm_unsafe_code)
    return loaded


def _prepare(name: str, task: Any, num_fewshot: int | None, code_confirmed: bool) -> None:
    """Sets the number of solved examples. Raises ConfigError for code that was not confirmed, and where a task allows no examples."""
    if getattr(task, "UNSAFE_CODE", False) and not code_confirmed:
        raise ConfigError(f"{WHERE}: {name} runs code that the model writes: set confirm_unsafe_code = true, or leave it out")
    if num_fewshot is None:
        return
    if task.get_config("num_fewshot") == 0 != num_fewshot:
        raise ConfigError(f"{WHERE}.num_fewshot: {name} is made for 0 solved examples, not {num_fewshot}")
    task.set_config(key="num_fewshot", value=num_fewshot)


def _as_asked(name: str, loaded: Mapping[str, Any]) -> list[Any]:
    """What simple_evaluate takes: the group, which has numbers of its own, or the tasks."""
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else [*loaded["tasks"].values()]


def _task_result(name: str, tasks: Sequence[str], results: Mapping[str, Any]) -> TaskResult:
    """Of one name in the config, which stands for these tasks of lm-eval's."""
    first = results["samples"][tasks[0]][0]
    metric, chosen = first["metrics"][0], first["filter"]
    items = [_item(task, sample, metric) for task in tasks for sample in results["samples"][task] if sample["filter"] == chosen]
    reported = {
        key: float(value) for key, value in results["results"].get(name, {}).items() if "," in key and isinstance(value, int | float)
    }
    return TaskResult(
        metric=f"{metric},{chosen}",
        value=sum(item.correct for item in items) / len(items),
        stderr=reported.get(f"{metric}_stderr,{chosen}"),
        n=len(items),
        num_fewshot=sorted({results["n-shot"][task] for task in tasks}),
        versions={one: results["versions"][one] for one in dict.fromkeys((*tasks, name)) if one in results["versions"]},
        reported=reported,
        items=items,
    )


def _item(task: str, sample: Mapping[str, Any], metric: str) -> Item:
    question, score = f"{task}/{sample['doc_id']}", sample.get(metric)
    if score not in (0, 1):
        raise HarnessError(
            f"{question}: {metric} = {score!r}: only what is right (1) or wrong (0) can be compared question by question; leave {task} out"
        )
    doc, prompt = sample["doc_hash"][:HASH_DIGITS], sample["prompt_hash"][:HASH_DIGITS]
    return Item(question, doc, prompt, bool(score == 1))  # a numpy number, often
