"""What the gradient of every entry of B does over many batches at initialisation: the sums that parameter placement scores (S3,
arXiv 2605.12207).

A is frozen at its random initialisation and B = 0, so that dA = 0 (it is not computed) and dB_m = s_m dY_mᵀ (x A_mᵀ) is that of the
untouched model. n batches of the run's own objective (grpo: completions sampled from it, rewarded; sft: the data) are passed through
without an optimizer step, and of each batch's whole gradient g

    sums[0] += g        sums[1] += sign g        sums[2] += |g|        sums[3] += g²

are kept per entry: one pass over the flat gradient. (ops.sparse_db can do the same for k known entries of a group inside the backward pass;
here all entries are candidates.) Batches whose gradient is zero everywhere, as GRPO's is when the rewards of every group are equal, carry
no signal: they are counted apart, and scoring goes on until n batches had one. The gradients are also kept to be compared with each
other (fastlora/gradient_structure.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastlora.atomic import atomic_write_bytes, atomic_write_text
from fastlora.build import Parts, build
from fastlora.config import RunConfig
from fastlora.errors import FastloraError, refuse_unknown_options
from fastlora.gradient_structure import GradientRows, Structure, structure_of
from fastlora.lora.packed import PackedAdapter, Slot
from fastlora.loss_config import LossConfig
from fastlora.objectives import Timer
from fastlora.ops.registry import use_implementation
from fastlora.progress import StepTimer
from fastlora.types import TrainBatch

SCORES_FILE = "scores.safetensors"
STRUCTURE_FILE = "structure.json"
SUMS = ("g", "sign g", "|g|", "g²")
"""Rows of a module's sums."""
LEAST_BATCHES = 16
"""With 5 batches 6 % of the entries tie in their sign sums; with 16 the chance that a sign holds by accident is 2^-15."""
MOST_SILENT = 4
"""Scoring gives up after this many times as many batches as were asked for."""
OPTIONS = ("batches",)
"""Of the task: the argument of `score_entries`."""

Say = Callable[[str], None]


class ScoringError(FastloraError):
    """Scores that cannot be made or read; the message names the setting or the file."""


@dataclass(frozen=True, slots=True)
class EntryScores:
    """What scores.safetensors and structure.json hold."""

    sums: Mapping[str, Tensor]
    """Adapted module -> float32 [4, n, r] in the order of SUMS."""
    model: str
    objective: str
    batches: int
    """With a signal: those that were summed."""
    batches_without_signal: int
    """Passed through besides, with a gradient of zero."""
    a_seed: int
    """Seed of A. Scores are of this A: a run with their mask needs the same (lora.init_seed), and the same ranks and scales."""
    seconds: Mapping[str, float]
    """Wall clock of sampling, reward, update and other, over all batches; loading is not counted."""
    structure: Structure
    """Of the gradients of all batches with a signal."""
    structure_by_projection: Mapping[str, Structure]
    """q_proj and so on -> the same of its entries alone."""
    exact: bool
    """The structure is that of the gradients themselves, not of a seeded sketch."""

    def write(self, folder: Path) -> None:
        """Writes `folder`/structure.json, then scores.safetensors, each atomically."""
        about = {name: getattr(self, name) for name in ("model", "objective", "batches", "batches_without_signal", "a_seed", "exact")}
        structure = {"whole": asdict(self.structure), "projections": {k: asdict(v) for k, v in self.structure_by_projection.items()}}
        text = json.dumps({**about, "seconds": dict(self.seconds), **structure}, indent=2, allow_nan=False)
        atomic_write_text(folder / STRUCTURE_FILE, text + "\n")
        tensors = {f"{name}.sums": sums_4nr.contiguous() for name, sums_4nr in self.sums.items()}
        metadata = {name: str(value) for name, value in about.items()} | {"seconds": json.dumps(dict(self.seconds))}
        atomic_write_bytes(folder / SCORES_FILE, save(tensors, metadata=metadata))


def read_sums(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(module -> float32 [4, n, r], metadata) of a scores.safetensors. Raises ScoringError when it is missing, damaged or another file."""
    if not path.is_file():
        raise ScoringError(f"{path}: no such file; a study's score task writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load_file(path)
    except SafetensorError as error:
        raise ScoringError(f"{path} is damaged: {error}") from None
    for name, sums in tensors.items():
        if not name.endswith(".sums") or sums.dim() != 3 or len(sums) != len(SUMS):
            raise ScoringError(f"{path}: {name} {list(sums.shape)} is not a module's sums [4, n, r]; is it a file of scores?")
    return {name.removesuffix(".sums"): sums for name, sums in tensors.items()}, metadata


def run_score(config: RunConfig, folder: Path, options: Mapping[str, Any], say: Say) -> None:
    """The task of a study: `score_entries` with these options into `folder`. Raises ScoringError for an unknown option."""
    refuse_unknown_options(options, OPTIONS, "a scoring", ScoringError)
    score_entries(config, **options, say=say).write(folder)


def score_entries(config: RunConfig, batches: int = LEAST_BATCHES, say: Say = lambda message: None) -> EntryScores:
    """Builds the config's run with A frozen and B = 0, and passes batches through it until `batches` of them had a gradient.

    Raises ScoringError: fewer than 16 batches, settings that contradict B = 0, or hardly any batch with a signal; and what `build` raises.
    """
    own = scoring_config(config, batches)
    parts = build(own, Console(quiet=True))
    with parts.rewards, parts.engine, use_implementation(own.trainer.implementation):
        return accumulate(own, parts, batches, say)


def scoring_config(config: RunConfig, batches: int) -> RunConfig:
    """The run whose generation batches are scored: one gradient a generation batch, of the policy as it starts."""
    if batches < LEAST_BATCHES:
        raise ScoringError(f"batches = {batches}: signs of fewer than {LEAST_BATCHES} batches agree by accident")
    for name, given in (
        ("method", config.method == "full"),
        ("lora.b_mask", config.lora.b_mask),
        ("lora.init_from", config.lora.init_from),
    ):
        if given:
            raise ScoringError(f"{name} is set: scores are of a fresh adapter (B = 0) of which every entry may train; remove it")
    settings = config.model_dump()
    settings["lora"] |= {"freeze_a": True}
    settings["vllm"] |= {"staleness": 0}
    settings["optim"] |= {"schedule": "constant", "warmup_steps": 0}
    parts = {"gradient_accumulation_steps": config.steps_per_generation, "steps_per_generation": None, "num_iterations": 1}
    settings["trainer"] |= {"steps": MOST_SILENT * batches, **parts}
    return RunConfig.model_validate(settings)


def accumulate(config: RunConfig, parts: Parts, batches: int, say: Say) -> EntryScores:
    """The sums over `batches` generation batches with a gradient; config: of `scoring_config`."""
    scorer = Scorer(config, parts, batches)
    seconds: Counter[str] = Counter()
    silent = step = 0
    while scorer.rows.added < batches:
        step += 1
        if step > config.trainer.steps:
            raise ScoringError(
                f"only {scorer.rows.added} of {step - 1} batches had a gradient, {batches} are needed: "
                "in all others the rewards of every group were equal. Use other problems, more samples or a higher temperature"
            )
        timer = StepTimer()
        silent += not scorer.add(step, timer)
        seconds.update({name.removeprefix("seconds/"): value for name, value in timer.lap().items()})
        say(f"scoring: {scorer.rows.added} of {batches} batches" + (f", {silent} more without a gradient" if silent else ""))
    return scorer.scores(silent, seconds)


class Scorer:
    """The sums and gradients of the batches that were added."""

    def __init__(self, config: RunConfig, parts: Parts, batches: int) -> None:
        """config: of `scoring_config`, from which `parts` were built; batches: the most that have a gradient."""
        assert parts.adapter is not None
        self._config, self._parts, self._adapter, self._grad = config, parts, parts.adapter, parts.flat.grad
        self._first = min(slot.b_offset for slot in parts.adapter.slots.values())  # all B lie behind all A
        self._sums_4b = torch.zeros(len(SUMS), len(self._grad) - self._first, device=self._grad.device)
        self.rows = GradientRows(_by_projection(parts.adapter), batches, seed=config.seed, device=self._grad.device)
        self._only_advantages = config.objective == "grpo" and is_linear_in_advantages(config.loss)

    def add(self, step: int, timer: Timer) -> bool:
        """Generation batch `step` (from 1). False when its gradient is zero everywhere, which then nothing is added of."""
        batch = self._parts.objective.collect(step, 0, timer).batch
        if self._only_advantages:
            batch = with_advantages_only(batch)
            if not bool(batch.loss_mask_nt.any()):
                return False
        with timer("update"), self._adapter.fresh():
            for micro_batch in batch.split(self._config.steps_per_generation):
                loss, _ = self._parts.objective.loss(micro_batch)
                if loss.requires_grad:  # a micro-batch without completion tokens has nothing to differentiate
                    loss.backward()
            signal = bool(self._grad.any())
            if signal:
                add_to_sums(self._sums_4b, self._grad[self._first :])
                self.rows.add(self._grad)
            self._grad.zero_()
        return signal

    def scores(self, silent: int, seconds: Mapping[str, float]) -> EntryScores:
        """Of all that was added; silent: batches without a gradient."""
        config, grams = self._config, self.rows.grams()
        return EntryScores(
            sums={name: _module_sums(self._sums_4b, slot, self._first) for name, slot in self._adapter.slots.items()},
            model=config.model.name,
            objective=config.objective,
            batches=self.rows.added,
            batches_without_signal=silent,
            a_seed=config.seed if config.lora.init_seed is None else config.lora.init_seed,
            seconds=dict(seconds),
            structure=structure_of(torch.stack(list(grams.values())).sum(0)),
            structure_by_projection={name: structure_of(gram_bb) for name, gram_bb in grams.items()},
            exact=self.rows.exact,
        )


def is_linear_in_advantages(config: LossConfig) -> bool:
    """A sample without advantage adds nothing to the gradient, and does not move that of another by its number of tokens."""
    own_terms = config.function is not None or config.beta or config.entropy_coef
    return not own_terms and config.loss_type in ("grpo", "dr_grpo", "dapo", "cispo") and config.top_entropy_quantile == 1.0


def with_advantages_only(batch: TrainBatch) -> TrainBatch:
    """The batch without the tokens of samples that have no advantage: half of them where every other group got equal rewards."""
    trains_n1 = (batch.advantages_nt != 0).any(1, keepdim=True)
    return replace(batch, completion_mask_nt=batch.completion_mask_nt & trains_n1, loss_mask_nt=batch.loss_mask_nt & trains_n1)


def add_to_sums(sums_4b: Tensor, grad_b: Tensor) -> None:
    """One batch more. Raises ScoringError for a gradient that is not finite."""
    if not bool(torch.isfinite(grad_b.sum())):
        raise ScoringError("the gradient of a batch is not finite; score with model.dtype = 'float32', or look at the data")
    sums_4b[0] += grad_b
    sums_4b[1] += grad_b.sign()
    sums_4b[2] += grad_b.abs()
    sums_4b[3].addcmul_(grad_b, grad_b)


def _by_projection(adapter: PackedAdapter) -> dict[str, list[slice]]:
    """q_proj and so on -> where the B of its modules lie in the flat buffer."""
    found: dict[str, list[slice]] = {}
    for slot in adapter.slots.values():
        end = slot.b_offset + slot.rank * slot.out_features
        found.setdefault(slot.name.rpartition(".")[2], []).append(slice(slot.b_offset, end))
    return found


def _module_sums(sums_4b: Tensor, slot: Slot, first: int) -> Tensor:
    """[4, n, r] of a module, which lies as [r, n]."""
    start = slot.b_offset - first
    return sums_4b[:, start : start + slot.rank * slot.out_features].view(-1, slot.rank, slot.out_features).transpose(1, 2).cpu()
