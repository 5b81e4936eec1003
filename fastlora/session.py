"""One run from start to finish: evaluate, train, evaluate again, save, summarise, report."""

from __future__ import annotations

import gc
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fastlora.analysis.report import write_report
from fastlora.build import Parts, build, peak_memory_bytes
from fastlora.checkpoint import Checkpoint, has_checkpoint, hash_config, load_checkpoint
from fastlora.config import RunConfig
from fastlora.errors import FastloraError, StoppedError
from fastlora.evaluate import Evaluation, evaluate
from fastlora.interrupt import interruptible
from fastlora.lora.peft_format import save_adapter
from fastlora.memory_plan import announce_engine, announce_peak
from fastlora.metrics import MetricsWriter, RunSummary, write_environment
from fastlora.model import weights_hash
from fastlora.progress import TrainingProgress, accuracy_table
from fastlora.reallocation import last_reallocation
from fastlora.run_folder import RunFolder, create_run_folder, open_run_folder
from fastlora.statistics import paired_test
from fastlora.trainer import Trainer

NOT_LEARNED = 3
"""Exit status of a run that trained but missed eval.required_gain."""


class BaseChangedError(FastloraError):
    """The frozen base weights are not what they were before training."""


def start_run(config: RunConfig, config_path: Path | None, console: Console) -> int:
    """A new run; returns the exit status. The folder is made only after everything that can be refused was."""
    announce_engine(config, console)
    parts = build(config, console)
    announce_peak(config, parts, console)
    folder = create_run_folder(config, config_path)
    write_environment(folder.path)
    status = _run(config, parts, folder, console, None)
    del parts  # two models at once may not fit
    return _next_phases(config, folder, console) if status is None else status


def resume_run(path: Path, console: Console, *, allow_previous: bool) -> int:
    """Continues a run from its newest checkpoint (or, if asked, the newest intact one); from the start when there is none yet."""
    folder, config = open_run_folder(path)
    checkpoint = None
    if has_checkpoint(path):
        checkpoint = load_checkpoint(path, config_hash=hash_config(config), allow_previous=allow_previous)
        for line in checkpoint.passed_over:
            console.print(f"passed over: {line}", markup=False, soft_wrap=True)
        console.print(f"Resuming {path} after step {checkpoint.step} of {config.trainer.steps}", highlight=False)
    announce_engine(config, console)
    parts = _build(config, console, checkpoint)
    announce_peak(config, parts, console)
    status = _run(config, parts, folder, console, checkpoint)
    del parts, checkpoint
    return _next_phases(config, folder, console) if status is None else status


def _next_phases(config: RunConfig, folder: RunFolder, console: Console) -> int:
    """From one reallocation of ranks to the next, as if the run were resumed each time: there is one way on from a checkpoint."""
    while True:
        gc.collect()  # the last phase's model is in reference cycles
        checkpoint = load_checkpoint(folder.path, config_hash=hash_config(config))
        console.print(f"The ranks moved after step {checkpoint.step} of {config.trainer.steps}", highlight=False)
        status = _run(config, _build(config, console, checkpoint), folder, console, checkpoint)
        if status is not None:
            return status


def _build(config: RunConfig, console: Console, checkpoint: Checkpoint | None) -> Parts:
    """At the ranks of the checkpoint."""
    last = None if checkpoint is None else last_reallocation(checkpoint)
    return build(config, console, None if last is None else last.ranks)


def _run(config: RunConfig, parts: Parts, folder: RunFolder, console: Console, checkpoint: Checkpoint | None) -> int | None:
    """Trains on from the checkpoint; the exit status, or None where the ranks have moved and the rest needs other parts."""
    base_hash = weights_hash(parts.model.module) if config.method == "lora" else None
    with parts.rewards, parts.engine, interruptible() as check_interrupt:
        before = _evaluation(config, parts, folder, "before", 0, console)
        trainer = Trainer(config, parts, folder, checkpoint)
        first = 1 if checkpoint is None else checkpoint.step + 1
        resume_step = None if checkpoint is None and not _has_metrics(folder) else first
        try:
            with (
                MetricsWriter(folder.path, tensorboard=config.log.tensorboard, resume_step=resume_step) as writer,
                TrainingProgress(config.trainer.steps, folder.path.name, completed=trainer.done.step, console=console) as progress,
            ):
                finished = trainer.run(writer, progress, check_interrupt)
        except StoppedError as stop:
            raise type(stop)(f"{stop}. Continue with: python train.py --resume {folder.path}") from None
        except FastloraError as error:
            raise type(error)(f"{error}\n{_how_to_go_on(folder)}") from error
        after = _evaluation(config, parts, folder, "after", trainer.done.optimizer_step, console) if finished else None
    if after is not None:
        _save_result(config, parts, folder)
    if base_hash is not None and weights_hash(parts.model.module) != base_hash:
        raise BaseChangedError("the frozen base weights changed during training; the adapter in this run cannot be trusted")
    return None if after is None else _conclude(config, parts, folder, trainer, before, after, console)


def _has_metrics(folder: RunFolder) -> bool:
    """True when an earlier process of this run died before its first checkpoint; its rows are dropped."""
    return (folder.path / "metrics.jsonl").exists()


def _how_to_go_on(folder: RunFolder) -> str:
    saved = sorted((folder.path / "checkpoints").glob("step-*"))
    if not saved:
        return f"No step was finished, so there is nothing to resume; what was logged is in {folder.path}"
    return f"Saved up to {saved[-1].name}. When the cause is mended, continue with: python train.py --resume {folder.path}"


def _evaluation(config: RunConfig, parts: Parts, folder: RunFolder, when: str, version: int, console: Console) -> Evaluation:
    """Greedy answers to the held-out problems, from the run's folder if an earlier process has them; pass@k beside them if asked."""
    path = folder.evaluation(when)
    if when == "before" and path.exists():
        return Evaluation.read(path)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"evaluating {when} training", total=len(parts.eval_examples))
        result = evaluate(
            parts.sampler,
            parts.rewards.grader,
            parts.eval_examples,
            config,
            adapter_version=version,
            progress=lambda done: bar.update(task, completed=done),
        )
    result.write(path)
    console.print(f"accuracy {when} training: {result.accuracy}", markup=False, highlight=False)
    for estimate in result.pass_at_k:
        console.print(f"pass@{estimate.k} {when} training: {estimate}", markup=False, highlight=False)
    return result


def _save_result(config: RunConfig, parts: Parts, folder: RunFolder) -> None:
    """The adapter as PEFT files, or the fine-tuned model."""
    if parts.adapter is not None:
        save_adapter(parts.adapter, folder.adapter, base_model=config.model.name, scaling=config.lora.scaling)
    else:
        parts.model.module.save_pretrained(folder.model)
        parts.model.tokenizer.save_pretrained(folder.model)


def _conclude(
    config: RunConfig, parts: Parts, folder: RunFolder, trainer: Trainer, before: Evaluation, after: Evaluation, console: Console
) -> int:
    """summary.json, report.html, the table; the exit status."""
    test, p0, p1 = paired_test(before.correct, after.correct), before.accuracy, after.accuracy
    required = config.eval.required_gain
    learned = None if required is None else test.difference >= required
    summary = RunSummary(
        name=folder.path.name,
        seed=config.seed,
        steps=trainer.done.step,
        accuracy_before=p0.value,
        accuracy_before_interval=(p0.low, p0.high),
        accuracy_after=p1.value,
        accuracy_after_interval=(p1.low, p1.high),
        accuracy_gain=test.difference,
        accuracy_gain_interval=(test.low, test.high),
        mcnemar_p=test.p_value,
        learned=learned,
        train_seconds=trainer.done.seconds,
        tokens=trainer.done.tokens,
        peak_memory_bytes=peak_memory_bytes(parts.model.device),
        trainable_parameters=parts.flat.num_trainable,
        rank_pattern=parts.adapter.rank_pattern if parts.adapter else {},
        pass_at_k_before=before.pass_at_k_intervals,
        pass_at_k_after=after.pass_at_k_intervals,
    )
    summary.write(folder.path)
    report = write_report(folder.path)
    console.print(accuracy_table(summary))
    console.print(f"report: {report}\nadapter: {folder.adapter if parts.adapter else folder.model}", highlight=False, soft_wrap=True)
    if learned is False:
        console.print(
            f"[bold red]The run did not learn:[/] accuracy rose by {100 * test.difference:.1f} points, eval.required_gain asks for "
            f"{100 * (required or 0):.1f}. Look at {report}; then more trainer.steps, another seed or optim.lr.",
            highlight=False,
        )
        return NOT_LEARNED
    return 0
