"""lm-evaluation-harness against plain transformers: log-likelihoods summed and answers continued by hand, float32, on two little tasks."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastlora.config import ConfigError, RunConfig
from fastlora.lora.peft_format import save_adapter
from fastlora.model import load_base_model
from fastlora.probe import LayerScores
from fastlora.statistics import paired_test
from fastlora.study.config import HarnessConfig, load_study_config
from fastlora.study.harness import CODE_VARIABLE, HARNESS_FILE, HarnessError, HarnessResult, Item, TaskResult, harness_model, run_harness
from fastlora.study.layer_selection import LayerSelection, harness_table, not_run
from tests.lora.adapters import attach_uneven
from tests.study.configs import write_study
from tests.study.synthetic_cell import make_cell
from tests.tolerances import FP32_LOGPROB

CAPITALS = (
    ("The capital of France is", ("Rome", "Paris", "Buenos Aires"), 1),
    ("The capital of Italy is", ("Rome", "Paris", "Buenos Aires"), 2),  # no model that knows it is right
    ("Water freezes at zero degrees", ("Celsius", "Fahrenheit", "of freedom"), 0),
    ("The opposite of hot is", ("warm", "cold"), 0),
)
"""Question, choices, number of the one that counts as right."""
OPPOSITES = (("The opposite of up is", ("down", "left"), 0), ("The opposite of left is", ("up", "down", "right"), 1))
SUMS = (("2 + 3", "5"), ("4 + 4", "9"), ("1 + 6", "7"))
EXAMPLES = (("1 + 1", "2"), ("5 + 2", "7"), ("6 + 3", "9"))

CHOICES = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
"""
TASKS = {
    "capitals": CHOICES,
    "opposites": CHOICES,
    "sums": """
output_type: generate_until
fewshot_split: train
fewshot_config: {sampler: first_n}
doc_to_text: "{{sum}} ="
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
filter_list:
  - {name: number, filter: [{function: regex, regex_pattern: "(-?[0-9]+)"}, {function: take_first}]}
  - {name: whole line, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
""",
    "code": """
output_type: multiple_choice
unsafe_code: true
num_fewshot: 0
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
process_results: !function graded.half
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "lost": """
output_type: generate_until
doc_to_text: question
doc_to_target: answer
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
"""Task -> its YAML, less the data; `lost` has none."""

GROUP = """
group: knowledge
task: [capitals, opposites]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 3}
"""

GRADED = f"""
import os
from pathlib import Path

def half(doc, results):
    Path(__file__).with_name("seen").write_text(os.environ["{CODE_VARIABLE}"])
    return {{"acc": 0.5}}
"""
"""Neither right nor wrong; leaves behind what it saw of the environment."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one's own tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    capitals, opposites = ([{"question": q, "choices": c, "answer": a} for q, c, a in part] for part in (CAPITALS, OPPOSITES))
    sums, examples = ([{"sum": text, "answer": answer} for text, answer in part] for part in (SUMS, EXAMPLES))
    files = {"capitals": capitals, "opposites": opposites, "sums": sums, "code": capitals[:2], "examples": examples}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = {"test": str(folder / f"{name}.jsonl"), **({"train": str(folder / "examples.jsonl")} if name == "sums" else {})}
        where = json.dumps({"data_files": data, "cache_dir": str(folder / "cache")})
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\ndataset_kwargs: {where}\ntest_split: test\n{text}")
    (folder / "knowledge.yaml").write_text(GROUP)
    (folder / "graded.py").write_text(GRADED)
    return folder


@pytest.fixture(autouse=True)
def few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval looks for its own tasks beside this file; to read all 14,000 takes 7 s."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "no tasks" / "manager.py"))


@pytest.fixture(scope="module")
def tokenizer(packaged_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged_model)


@pytest.fixture(scope="module")
def plain(packaged_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(packaged_model, dtype=torch.float32).eval()


def cell_config(adapter: Path | None = None) -> RunConfig:
    model = {"name": "smollm2-135m-instruct", "dtype": "float32", "device": "cpu"}
    return RunConfig.model_validate({"model": model, "lora": {"init_from": adapter}})


def options(folder: Path | None, *tasks: str, **more: Any) -> dict[str, Any]:
    return HarnessConfig(tasks=tasks, include_path=folder, **more).model_dump()


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    """Σ log p of the tokens by which prompt + answer is longer than the prompt."""
    start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer).input_ids
    logp_tv = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp_tv[t - 1, ids[t]]) for t in range(start, len(ids)))


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """The most likely token, again and again, up to the end of the line."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def right_choices(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[Any, ...]]) -> list[bool]:
    found = []
    for question, choices, answer in questions:
        scores = [log_likelihood(model, tokenizer, f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
        found.append(scores.index(max(scores)) == answer)
    return found


def right_sums(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: int) -> list[bool]:
    solved = "".join(f"{text} = {answer}\n\n" for text, answer in EXAMPLES[:examples])
    texts = [continuation(model, tokenizer, f"{solved}{text} =", 3) for text, _ in SUMS]
    numbers = [re.findall("-?[0-9]+", text)[:1] for text in texts]
    return [number == [answer] for number, (_, answer) in zip(numbers, SUMS, strict=True)]


def test_right_is_what_plain_transformers_finds_right(
    folder: Path, tmp_path: Path, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    said: list[str] = []
    run_harness(cell_config(), tmp_path, options(folder, "knowledge", "sums", num_fewshot={"sums": 2}, batch_size=3), said.append)
    found = HarnessResult.read(tmp_path)
    knowledge, sums = found.tasks["knowledge"], found.tasks["sums"]
    assert knowledge.correct == right_choices(plain, tokenizer, CAPITALS + OPPOSITES)
    assert sums.correct == right_sums(plain, tokenizer, examples=2)
    assert {*knowledge.correct} == {*sums.correct} == {True, False}, "tasks that decide nothing"
    assert (knowledge.metric, knowledge.num_fewshot) == ("acc,none", [0])
    assert knowledge.versions == {"capitals": 1.5, "opposites": 1.5, "knowledge": "3"}
    assert (sums.metric, sums.versions, sums.num_fewshot) == ("exact_match,number", {"sums": 2.0}, [2])
    for task, n in ((knowledge, 6), (sums, 3)):
        p = sum(task.correct) / n
        assert (task.n, task.value, task.reported[task.metric]) == (n, p, pytest.approx(p))
        assert task.stderr == task.reported[task.metric.replace(",", "_stderr,")] > 0
        assert len({item.prompt_hash for item in task.items}) == len({item.doc_hash for item in task.items}) == n
    assert sums.stderr == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert [item.question for item in knowledge.items] == [*(f"capitals/{i}" for i in range(4)), "opposites/0", "opposites/1"]
    assert [item.question for item in sums.items] == [f"sums/{i}" for i in range(3)]
    assert said == [f"harness: {name}: {t.metric} {t.value:.3f}, {t.n} questions" for name, t in found.tasks.items()]
    assert (found.model, found.adapter) == ("smollm2-135m-instruct", None)


def test_an_adapter_answers_as_its_merged_weights_do(
    folder: Path, tmp_path: Path, packaged_model: Path, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = load_base_model(cell_config().model)
    adapter = attach_uneven(trained.module, noise=0.05)
    save_adapter(adapter, tmp_path / "adapter", base_model="smollm2", scaling="alpha/r")
    merged = AutoModelForCausalLM.from_pretrained(packaged_model, dtype=torch.float32).eval()
    for name, slot in adapter.slots.items():
        merged.get_submodule(name).weight.data += slot.scale * adapter.b_rn(name).t() @ adapter.a_rd(name)
    asked = [(f"Question: {question}\nAnswer:", f" {choice}") for question, choices, _ in CAPITALS for choice in choices]
    with_adapter = harness_model(cell_config(tmp_path / "adapter"), batch_size=4)
    found = [value for value, _ in with_adapter.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])]
    expected, base = ([log_likelihood(model, tokenizer, *pair) for pair in asked] for model in (merged, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=FP32_LOGPROB * 50)  # of the largest logit
    assert min(abs(a - b) for a, b in zip(expected, base, strict=True)) > 0.01, "an adapter that changes nothing"
    run_harness(cell_config(tmp_path / "adapter"), tmp_path, options(folder, "capitals", limit=2), print)
    written = HarnessResult.read(tmp_path)
    assert written.tasks["capitals"].correct == right_choices(merged, tokenizer, CAPITALS[:2])
    assert written.adapter == str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('tasks = ["mmlu", "humaneval"]', "layer_selection.harness: tasks: humaneval runs code that the model writes.*Set confirm_unsafe"),
        ('tasks = ["mbpp_plus"]', "mbpp_plus runs code"),
        ('tasks = ["mmlu", "mmlu"]', "tasks: mmlu stands there twice"),
        ('tasks = ["mmlu"]\nnum_fewshot = { mlu = 5 }', "num_fewshot: mlu is not among the tasks"),
        ('tasks = ["mmlu"]\nlimit = 0', "layer_selection.harness.limit: .*greater than 0"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, lines: str, message: str) -> None:
    study = write_study(tmp_path, f"[layer_selection.harness]\n{lines}\n", study="layer-selection")
    with pytest.raises(ConfigError, match=message):
        load_study_config(study)


def test_humaneval_can_be_confirmed(tmp_path: Path) -> None:
    lines = '[layer_selection.harness]\ntasks = ["humaneval"]\nconfirm_unsafe_code = true\n'
    assert load_study_config(write_study(tmp_path, lines, study="layer-selection")).layer_selection.harness.tasks == ("humaneval",)


@pytest.mark.parametrize(
    ("tasks", "more", "error", "message"),
    [
        (("code",), {}, ConfigError, "layer_selection.harness: code runs code that the model writes"),
        (("code",), {"num_fewshot": {"code": 3}, "confirm_unsafe_code": True}, ConfigError, "code is made for 0 solved examples, not 3"),
        (("lost",), {}, HarnessError, r"layer_selection.harness.tasks: 'lost' cannot be loaded: .*lost.jsonl.* load them once where the"),
        (("capitels",), {}, HarnessError, r"lm-eval has no task 'capitels'; did you mean capitals"),
    ],
)
def test_tasks_that_cannot_be_run(
    folder: Path, tmp_path: Path, tasks: tuple[str, ...], more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_harness(cell_config(), tmp_path, options(folder, *tasks, **more), print)
    assert not (tmp_path / HARNESS_FILE).exists()


def test_code_is_allowed_during_the_call_and_a_score_between_right_and_wrong_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"code/0: acc = 0.5: only what is right \(1\) or wrong \(0\)"):
        run_harness(cell_config(), tmp_path, options(folder, "code", confirm_unsafe_code=True), print)
    assert (folder / "seen").read_text() == "1"
    assert CODE_VARIABLE not in os.environ


def test_without_lm_eval_it_says_what_to_install(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HarnessError, match=r"needs lm-eval and PEFT, and lm_eval is not installed: `make setup-study`"):
        run_harness(cell_config(), tmp_path, options(folder, "capitals"), print)


def result(**correct: str) -> HarnessResult:
    """Task -> its answers, "1" right and "0" wrong."""
    tasks = {}
    for name, answers in correct.items():
        items = [Item(f"{name}/{i}", f"doc {i}", f"prompt {i}", answer == "1") for i, answer in enumerate(answers)]
        value = answers.count("1") / len(answers)
        tasks[name] = TaskResult("acc,none", value, None, len(answers), [5], {name: 1.0}, {"acc,none": value}, items)
    return HarnessResult("0.4.13", "a model", None, tasks)


def write(folder: Path, written: HarnessResult) -> Path:
    folder.mkdir(parents=True)
    written.write(folder)
    return folder


BASE = {"mmlu": "1" * 30 + "0" * 10, "gsm8k": "10" * 10}
TOP = {"mmlu": "1" * 18 + "0" * 14 + "1" * 8, "gsm8k": "10" * 10}
LAST = {"mmlu": "1" * 30 + "0" * 10, "gsm8k": "11" * 7 + "10" * 3}


@pytest.fixture
def answered(tmp_path: Path) -> dict[str, Path]:
    found = {"base": BASE, "top-sft/seed-0": TOP, "last-sft/seed-0": LAST}
    return {name: write(tmp_path / name, result(**answers)) for name, answers in found.items()}


def test_the_table_is_paired_question_by_question(answered: dict[str, Path]) -> None:
    table = harness_table(answered)
    rows = {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [*rows] == [(cell, task) for cell in ("top-sft/seed-0", "last-sft/seed-0") for task in ("mmlu", "gsm8k")]
    p_values = {("top-sft/seed-0", "mmlu"): binomtest(8, 20).pvalue, ("last-sft/seed-0", "gsm8k"): binomtest(7, 7).pvalue}
    top = rows["top-sft/seed-0", "mmlu"]
    assert (top["n"], top["base model"], top["with the adapter"], top["p, Holm"]) == (40, 0.75, 0.65, 1.0)
    for (cell, task), row in rows.items():
        after = {"top-sft/seed-0": TOP, "last-sft/seed-0": LAST}[cell][task]
        test = paired_test([a == "1" for a in BASE[task]], [a == "1" for a in after])
        assert (row["change"], row["low"], row["high"], row["McNemar's p"]) == (test.difference, test.low, test.high, test.p_value)
        assert row["McNemar's p"] == pytest.approx(p_values.get((cell, task), 1.0))
    assert rows["last-sft/seed-0", "gsm8k"]["p, Holm"] == pytest.approx(4 * binomtest(7, 7).pvalue)
    assert "lm-evaluation-harness 0.4.13. mmlu: acc,none, 5 examples; gsm8k: acc,none, 5 examples." in table.note


def test_models_that_were_not_asked_the_same_are_not_compared(answered: dict[str, Path], tmp_path: Path) -> None:
    file = answered["top-sft/seed-0"] / HARNESS_FILE
    text = file.read_text()
    for old, new, message in (
        ('"prompt 3"', '"prompt of other examples"', "harness/top-sft/seed-0: mmlu was asked with other questions, prompts"),
        ("0.4.13", "0.4.12", "lm-eval 0.4.13 on mmlu, gsm8k and lm-eval 0.4.12 on mmlu, gsm8k cannot be compared"),
        ('"items"', '"itms"', "harness.json is damaged"),
    ):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(HarnessError, match=message):
            harness_table(answered)


SECTION = """
seeds = [0]
[layer_selection]
selections = ["all", "top"]
objectives = ["sft"]
[layer_selection.harness]
tasks = ["mmlu", "gsm8k"]
num_fewshot = { mmlu = 5 }
limit = 20
"""


def scores(folder: Path, modules: tuple[str, ...]) -> Path:
    """A probe's file with equal scores."""
    folder.mkdir()
    by_batch = {layer: [1.0] for layer in range(30)}
    layers = dict.fromkeys(by_batch, 1.0)
    LayerScores(layers, dict.fromkeys(modules, 1.0), by_batch, "m", "sft", 1, 0, 1, 42, 4, 1.0, 1, 1, 1).write(folder)
    return folder


def test_the_base_model_is_asked_first_and_every_adapter_last(tmp_path: Path) -> None:
    study = LayerSelection(load_study_config(write_study(tmp_path, SECTION, study="layer-selection")))
    plan = study.plan()
    first = next(plan)
    assert [cell.name for cell in first] == ["harness/base", "probe/seed-0"]
    base = first[0]
    assert (base.task, base.config.lora.init_from) == ("harness", None)
    assert base.options == study.own.harness.model_dump() and base.options["num_fewshot"] == {"mmlu": 5}
    trained = plan.send({"probe/seed-0": scores(tmp_path / "probe", study.modules)})
    assert (trained[-1].name, trained[-1].task) == ("update time/sft", "update_time")
    assert list(trained[-1].options["runs"]) == ["all", "top"]
    names = [cell.name for cell in trained[:-1]]
    last = plan.send({name: tmp_path / name for name in names})
    assert [cell.name for cell in last] == [f"harness/{name}" for name in names] == ["harness/all-sft/seed-0", "harness/top-sft/seed-0"]
    assert [cell.config.lora.init_from for cell in last] == [tmp_path / name / "adapter" for name in names]
    assert all((cell.task, cell.options) == ("harness", base.options) for cell in last)
    with pytest.raises(StopIteration):
        plan.send({})


def test_the_report_has_the_table_and_says_what_was_not_run(tmp_path: Path) -> None:
    study = LayerSelection(load_study_config(write_study(tmp_path, SECTION, study="layer-selection")))
    folders = {"probe/seed-0": scores(tmp_path / "probe", study.modules)}
    folders |= {name: make_cell(tmp_path / name.partition("-")[0], seed=0) for name in ("all-sft/seed-0", "top-sft/seed-0")}
    asked = {"base": BASE, "all-sft/seed-0": LAST, "top-sft/seed-0": TOP}
    folders |= {f"harness/{name}": write(tmp_path / "asked" / name, result(**answers)) for name, answers in asked.items()}
    report = study.report(folders, "a command")
    assert {table.name for table in report.tables} >= {"accuracy", "selections", "harness"}
    assert "HumanEval, all of mmlu, gsm8k (the first 20 questions of each task were asked): the" in report.may_not_conclude[-1]


def test_what_was_not_run_follows_what_was() -> None:
    both = "the published study measured them, this one did not"
    assert not_run("m", HarnessConfig()) == f"Anything about models larger than m, MMLU, GSM8K, HumanEval: {both}"
    everything = HarnessConfig(tasks=("humaneval", "gsm8k", "mmlu"), confirm_unsafe_code=True)
    assert not_run("m", everything) == f"Anything about models larger than m: {both}"
