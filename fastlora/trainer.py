"""The training loop: collect, score, backward, step; metrics, evaluation and checkpoints around it.

`Trainer.run` reads like the algorithm. Everything random is a function of the run's seed and the step, so that the state between
steps is the parameters, their ranks, the optimizer, the few numbers of objective and alarms, and the step itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.alarms import Alarms
from fastlora.atomic import DiskFullError
from fastlora.build import Parts, peak_memory_bytes
from fastlora.checkpoint import Checkpoint, hash_config, restore_rng_state, rng_state, save_checkpoint
from fastlora.config import RunConfig
from fastlora.errors import StoppedByAlarmError, StoppedError
from fastlora.evaluate import Evaluation, answer_greedily
from fastlora.gradient_profile import delta_w_norms, rank_component_norms
from fastlora.gradient_structure import ConsecutiveCosine
from fastlora.interrupt import Interrupted
from fastlora.metrics import GRADIENT_PROFILE_FILE, MetricsWriter, read_gradient_profile
from fastlora.objectives import StepData
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer, TrainingProgress
from fastlora.reallocation import Carried, Reallocation, carry, last_reallocation, moved_rank, new_ranks
from fastlora.rollout.sampler import derived_seed
from fastlora.run_folder import RunFolder
from fastlora.types import TrainBatch


@dataclass(slots=True)
class Done:
    """What a run has done so far."""

    step: int = 0
    """Finished generation batches."""
    optimizer_step: int = 0
    """Optimizer steps taken or skipped: the position in the schedule and the adapter's version."""
    tokens: int = 0
    """Completion tokens trained on."""
    seconds: float = 0.0
    """Wall-clock time of the steps, over all resumptions."""


class Trainer:
    """One run, or its part up to a reallocation of ranks. `run()` does the remaining steps."""

    def __init__(self, config: RunConfig, parts: Parts, folder: RunFolder, resume_from: Checkpoint | None = None) -> None:
        self.config, self.parts, self.folder = config, parts, folder
        self.done = Done()
        self._torn = False  # the parts are not in the state that the last finished step left
        self._cosine = ConsecutiveCosine(parts.flat.grad) if config.log.gradient_cosine else None
        self._alarms = Alarms(config)
        self._reallocation: Reallocation | None = None  # the last one
        if resume_from is not None:
            self._restore(resume_from)

    def run(self, writer: MetricsWriter, progress: TrainingProgress, check_interrupt: Callable[[], None]) -> bool:
        """Trains to the last step, or (False) to a checkpoint with other ranks, which the run goes on from with parts built for them.

        Raises StoppedError after saving what can be saved; other errors pass through after the same.
        """
        trainer = self.config.trainer
        with use_implementation(trainer.implementation), self._saving_on_failure(writer):
            while self.done.step < trainer.steps:
                if self._reallocation_is_due() and self._reallocate(writer):
                    check_interrupt()
                    return False
                step = self.done.step + 1
                metrics = self._step(step, writer, check_interrupt)
                try:
                    if self.config.eval.every and step % self.config.eval.every == 0 and step < trainer.steps:
                        metrics |= self._evaluate()
                finally:  # the step is finished and will not be done again, whatever becomes of its evaluation
                    writer.step(step, metrics)
                progress.update({"step": step, **metrics})
                self._check_alarms(step, metrics, writer, progress)
                if step == trainer.steps or (trainer.checkpoint_every and step % trainer.checkpoint_every == 0):
                    self._save(writer)
                check_interrupt()
        return True

    def _reallocation_is_due(self) -> bool:
        """Before every step that follows a multiple of `reallocation.every`; a resumed run may find it done, or not."""
        step, every = self.done.step, self.config.reallocation.every
        return every > 0 and step > 0 and step % every == 0 and (self._reallocation is None or self._reallocation.step < step)

    def _reallocate(self, writer: MetricsWriter) -> bool:
        """Gives units the ranks that their gradients ask for; True when some moved, and a checkpoint at the new ranks is written."""
        adapter, step = self.parts.adapter, self.done.step
        assert adapter is not None, "full fine-tuning with [reallocation] is refused by the config"
        writer.flush()
        profile = read_gradient_profile(self.folder.path / GRADIENT_PROFILE_FILE)
        since = 0 if self._reallocation is None else self._reallocation.step
        ranks = new_ranks(adapter, profile, since, step, self.config)
        moved = moved_rank(adapter, ranks)
        seed = derived_seed(self.config.seed, step)
        carried = carry(adapter, self.parts.optimizer, ranks, scaling=self.config.lora.scaling, seed=seed)
        metrics = {"reallocation/moved_rank": float(moved), "reallocation/delta_w_error": carried.delta_w_error}
        reallocation = Reallocation(step, ranks, metrics)
        if moved:
            self._save(writer, reallocation, carried)
            self._torn = True  # these parts are behind that checkpoint, and must not replace it
        self._reallocation = reallocation
        return moved > 0

    def _step(self, step: int, writer: MetricsWriter, check_interrupt: Callable[[], None]) -> dict[str, float]:
        """One generation batch: collect it, then an optimizer step per `gradient_accumulation_steps` micro-batches."""
        timer = StepTimer()
        data = self.parts.objective.collect(step, self.done.optimizer_step, timer)
        check_interrupt()
        sums: dict[str, list[float]] = defaultdict(list)
        with timer("update"):
            for norms in self.optimizer_steps(data.batch, sums):
                if self.parts.adapter is not None:
                    writer.gradient_norms(step, self.parts.flat.segments, *norms)
        writer.completions(data.samples)
        return self._finish_step(step, data, sums, timer.lap())

    def optimizer_steps(self, batch: TrainBatch, sums: dict[str, list[float]]) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Takes every optimizer step of one generation batch; metrics are appended to `sums`. Yields each gradient's norms, as
        `MetricsWriter.gradient_norms` takes them.
        """
        for window in self._windows(batch):
            yield self._optimizer_step(window, sums)

    def _windows(self, batch: TrainBatch) -> Iterator[list[TrainBatch]]:
        """The micro-batches of one generation batch, `num_iterations` times over, in groups of one optimizer step."""
        trainer = self.config.trainer
        micro_batches = batch.split(self.config.steps_per_generation) * trainer.num_iterations
        for first in range(0, len(micro_batches), trainer.gradient_accumulation_steps):
            yield micro_batches[first : first + trainer.gradient_accumulation_steps]

    def _optimizer_step(self, window: list[TrainBatch], sums: dict[str, list[float]]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Backward through every micro-batch of the window, then one step; its metrics are appended to `sums`.

        Returns the norms of the gradient.
        """
        total = 0.0
        for micro_batch in window:
            loss, metrics = self.parts.objective.loss(micro_batch)
            if loss.requires_grad:  # a micro-batch without completion tokens has nothing to differentiate
                loss.backward()
            total += loss.item()
            for name, value in metrics.items():
                sums[name].append(float(value))
        adapter = self.parts.adapter
        delta_w_m = None if adapter is None else delta_w_norms(adapter)  # now, since the step moves A
        component_norms_r = rank_component_norms(self.parts.flat) if self.config.log.rank_components else None
        lr = self.parts.learning_rates[self.done.optimizer_step]
        self._torn = True
        result = self.parts.optimizer.step(lr, loss_finite=math.isfinite(total))
        if self._cosine is not None and (cosine := self._cosine.next(self.parts.flat.grad)) is not None:
            sums["gradient/cosine"].append(cosine)
        self.parts.flat.grad.zero_()
        self.parts.objective.optimizer_stepped()
        self.done.optimizer_step += 1
        for name, number in (("loss", total), ("grad_norm", result.grad_norm), ("grad_clipped", float(result.clipped)), ("lr", lr)):
            sums[name].append(number)
        return result.norms_m, delta_w_m, component_norms_r

    def _finish_step(self, step: int, data: StepData, sums: Mapping[str, list[float]], seconds: dict[str, float]) -> dict[str, float]:
        self._torn = False
        self.done.step = step
        self.done.tokens += data.num_tokens
        step_seconds = sum(seconds.values())
        self.done.seconds += step_seconds
        reallocated = {} if self._reallocation is None or self._reallocation.step != step - 1 else self._reallocation.metrics
        return {
            **{name: sum(values) / len(values) for name, values in sums.items()},
            **data.metrics,
            **reallocated,
            **self.parts.objective.step_metrics(),
            **seconds,
            "tokens": float(data.num_tokens),
            "tokens_per_second": data.num_tokens / step_seconds,
            "skipped_steps": float(self.parts.optimizer.steps_skipped),
            "memory/peak_bytes": float(peak_memory_bytes(self.parts.model.device)),
        }

    def _check_alarms(self, step: int, metrics: Mapping[str, float], writer: MetricsWriter, progress: TrainingProgress) -> None:
        """Writes and says what went off. Raises StoppedByAlarmError if that is an alarm's action."""
        alarms = self._alarms.check(step, metrics)
        for alarm in alarms:
            writer.alarm(alarm)
            progress.note(f"alarm: {alarm}")
        if fatal := [str(alarm) for alarm in alarms if alarm.action == "stop"]:
            raise StoppedByAlarmError("; ".join(fatal))

    def _evaluate(self) -> dict[str, float]:
        """Greedy accuracy on the first problems of the held-out split."""
        problems = self.parts.eval_examples[: self.config.eval.num_problems_during]
        answers = answer_greedily(
            self.parts.sampler, self.parts.rewards.grader, problems, self.config.rollout, adapter_version=self.done.optimizer_step
        )
        accuracy = Evaluation(answers).accuracy
        return {"eval/accuracy": accuracy.value, "eval/num_problems": float(accuracy.n)}

    def _save(self, writer: MetricsWriter, reallocation: Reallocation | None = None, carried: Carried | None = None) -> None:
        """A checkpoint of the last finished step; metrics reach the disk first, so that they can be cut back to it.

        With a reallocation and what it carried over: at the ranks that the next step begins with.
        """
        writer.flush()
        optimizer_tensors, optimizer = _split_tensors("optimizer", self.parts.optimizer.state_dict())
        objective_tensors, objective = _split_tensors("objective", self.parts.objective.state())
        rng_tensors, rng_json = rng_state()
        parameters = self.parts.flat.data if carried is None else carried.parameters
        tensors = {"parameters": parameters, **rng_tensors, **optimizer_tensors, **objective_tensors}
        if self._cosine is not None:  # across a reallocation, gradients of different ranks have no cosine
            tensors["last_gradient"] = self._cosine.last if carried is None else torch.zeros_like(parameters)
        if carried is not None:
            tensors |= {"optimizer.exp_avg": carried.exp_avg, "optimizer.exp_avg_sq": carried.exp_avg_sq}
        last = reallocation or self._reallocation
        state: dict[str, Any] = {
            "progress": {name: getattr(self.done, name) for name in Done.__slots__},
            "optimizer": optimizer,
            "objective": objective,
            "alarms": self._alarms.state(),
            "reallocation": None if last is None else asdict(last),
            "rng": rng_json,
        }
        save_checkpoint(
            self.folder.path,
            step=self.done.step,
            tensors=tensors,
            state=state,
            config_hash=hash_config(self.config),
            keep=self.config.trainer.keep_checkpoints,
        )

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        self.parts.flat.data.copy_(tensors["parameters"])
        if self._cosine is not None:
            self._cosine.last.copy_(tensors["last_gradient"])
        self.parts.optimizer.load_state_dict(_joined_tensors("optimizer", tensors) | state["optimizer"])
        self.parts.objective.restore(_joined_tensors("objective", tensors) | state["objective"])
        self._alarms.restore(state["alarms"])
        self.done = Done(**state["progress"])
        self._reallocation = last_reallocation(checkpoint)
        restore_rng_state(tensors, state["rng"])

    def _saving_on_failure(self, writer: MetricsWriter) -> ExitStack:
        """Leaves a checkpoint of the last finished step behind whatever ends the loop, unless parameters have moved since."""
        stack = ExitStack()

        def on_exit(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
            if error is None:
                return False
            if not (self._torn or self.done.step == 0 or isinstance(error, DiskFullError)):
                self._save(writer)
            if isinstance(error, Interrupted):
                raise StoppedError(f"stopped after step {self.done.step} of {self.config.trainer.steps}") from None
            return False

        stack.push(on_exit)
        return stack


def _split_tensors(owner: str, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors under the owner's name, the rest): the two halves of a checkpoint."""
    tensors = {f"{owner}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}


def _joined_tensors(owner: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The owner's tensors of a checkpoint, by their own names."""
    return {name.removeprefix(f"{owner}."): tensor for name, tensor in tensors.items() if name.startswith(f"{owner}.")}
