"""A run folder as training would leave it, without training: SmolLM2's shape, uneven ranks, plausible curves.

`python -m tests.analysis.synthetic_run FOLDER` writes one and its report, to look at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

from fastlora.analysis.report import write_report
from fastlora.config import RunConfig
from fastlora.evaluate import Answer, Evaluation
from fastlora.metrics import CompletionSample, MetricsWriter, RunSummary, write_environment
from fastlora.ops.adamw_step import Segment
from fastlora.run_folder import CONFIG_FILE, RunFolder
from fastlora.statistics import paired_test

HOSTILE = "<script>alert('x')</script> & \u2028 <b>"
"""A completion that would break a page that does not escape it."""

WIDTHS = {  # projection -> (block, in, out) of SmolLM2-135M
    "q_proj": ("self_attn", 576, 576), "k_proj": ("self_attn", 576, 192), "v_proj": ("self_attn", 576, 192),
    "o_proj": ("self_attn", 576, 576), "gate_proj": ("mlp", 576, 1536), "up_proj": ("mlp", 576, 1536),
    "down_proj": ("mlp", 1536, 576),
}  # fmt: skip


def make_run(
    folder: Path,
    *,
    layers: int = 30,
    steps: int = 40,
    problems: int = 256,
    learns: bool = True,
    objective: str = "grpo",
    seed: int = 0,
) -> Path:
    """Writes the folder of a finished run and returns it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    config = RunConfig.model_validate({"name": folder.name, "objective": objective, "trainer": {"steps": steps}})
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2))
    write_environment(folder)
    ranks = uneven_ranks(layers, rng)
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            writer.step(step, metrics_row(step, steps, learns, objective, rng))
            norms_m = gradient_norms(step, ranks, rng)
            delta_w_m = 8 * norms_m / torch.tensor([segment.shape[0] for segment in segments(ranks)]).sqrt()
            writer.gradient_norms(step, segments(ranks), norms_m, delta_w_m, None)
            if objective == "grpo":
                writer.completions(training_samples(step, rng))
    before, after = answers(problems, 0.53, rng), answers(problems, 0.72 if learns else 0.53, rng)
    Evaluation(before).write(RunFolder(folder).evaluation("before"))
    Evaluation(after).write(RunFolder(folder).evaluation("after"))
    summarise(folder.name, steps, seed, ranks, Evaluation(before), Evaluation(after), learns).write(folder)
    return folder


def uneven_ranks(layers: int, rng: Generator) -> dict[str, int]:
    """Module -> rank: larger in the middle layers and in the MLP, some 0."""
    ranks = {}
    for layer in range(layers):
        for projection, (block, _, _) in WIDTHS.items():
            bump = 22 * np.exp(-(((layer - 0.6 * layers) / (0.25 * layers)) ** 2)) + (6 if block == "mlp" else 0)
            rank = int(max(0, bump + rng.normal(0, 3)))
            ranks[f"model.layers.{layer}.{block}.{projection}"] = rank
    return ranks


def segments(ranks: dict[str, int]) -> list[Segment]:
    """As the packed adapter lists them; only shapes and names matter here."""
    found = []
    for module, rank in ranks.items():
        _, d, n = WIDTHS[module.rpartition(".")[2]]
        if rank:
            found += [
                Segment(f"{module}.lora_A", 0, (rank, d), transposed=False),
                Segment(f"{module}.lora_B", 0, (rank, n), transposed=True),
            ]
    return found


def gradient_norms(step: int, ranks: dict[str, int], rng: Generator) -> torch.Tensor:
    """‖g‖ ∝ √r with a profile over depth; dA is exactly 0 at the first step, where B = 0."""
    norms = []
    for i, rank in enumerate(rank for rank in ranks.values() if rank):
        size = np.sqrt(rank) * (0.02 + 0.03 * np.sin(i / 30) ** 2) * np.exp(rng.normal(0, 0.25)) / (1 + step / 60)
        norms += [0.0 if step == 1 else size * 0.3 * np.sqrt(step / 10), size]
    return torch.tensor(norms)


def metrics_row(step: int, steps: int, learns: bool, objective: str, rng: Generator) -> dict[str, float]:
    """Names as the trainer writes them."""
    share = step / steps if learns else 0.0
    seconds = {
        "sampling": rng.normal(3.1, 0.2),
        "reward": 0.04,
        "update": rng.normal(7.3, 0.3),
        "other": 0.2 + 6.0 * (step % 10 == 0),
    }
    common = {
        "loss": rng.normal(0, 0.02), "grad_norm": float(np.exp(rng.normal(-1, 0.4))), "grad_clipped": 0.0,
        "lr": 3e-4 * min(1, step / 5), "tokens": 460.0, "tokens_per_second": 460 / sum(seconds.values()),
        "skipped_steps": float(step > 17), "memory/peak_bytes": 3.2e9 + 2e6 * step,
        **{f"seconds/{stage}": float(value) for stage, value in seconds.items()},
    }  # fmt: skip
    if step % 10 == 0 and step < steps:
        common |= {"eval/accuracy": round(64 * (0.53 + 0.17 * share)) / 64, "eval/num_problems": 64.0}
    if objective == "sft":
        return common | {"nll": 2.0 * np.exp(-2 * share) + rng.normal(0, 0.05)}
    mean = float(np.clip(0.42 + 0.25 * share + rng.normal(0, 0.05), 0, 1))
    return common | {
        "reward/mean": mean, "reward/std": float(np.sqrt(mean * (1 - mean))),
        "reward/frac_zero_std": float(rng.uniform(0.2, 0.6)),
        "reward/first_integer": mean, "reward/timeouts": 0.0, "reward/unscorable": 0.0,
        "kl": 0.002 * step * rng.uniform(0.8, 1.2),
        "entropy": 0.9 - 0.4 * share + rng.normal(0, 0.02), "clip_ratio/low_mean": float(abs(rng.normal(0, 0.004))),
        "clip_ratio/high_mean": float(abs(rng.normal(0, 0.006))), "clip_ratio/region_mean": float(abs(rng.normal(0, 0.008))),
        "completion/length_mean": 7.2 - 2 * share, "completion/truncated": 0.3 * (1 - share) if step != 12 else float("nan"),
    }  # fmt: skip


def problem(index: int) -> tuple[str, int]:
    """Chat prompt with prefill, and its answer."""
    a, b = 7 + 13 * index % 90, 3 + 29 * index % 88
    question = f"{a} + {b}"
    return f"<|im_start|>user\nWhat is {question}?<|im_end|>\n<|im_start|>assistant\n{question} =", a + b


def training_samples(step: int, rng: Generator) -> list[CompletionSample]:
    """One of each kind: right, wrong and cut off, hostile and unscorable."""
    prompt, gold = problem(step)
    return [
        CompletionSample(step, prompt, f" {gold}.", str(gold), {"first_integer": 1.0}, 0.9, 4, True, step - 1),
        CompletionSample(
            step, prompt, f" {gold + 1} because " * 3, str(gold), {"first_integer": 0.0}, float(rng.normal()), 16, False, step - 1
        ),
        CompletionSample(step, prompt, HOSTILE, str(gold), {"first_integer": float("nan")}, float("nan"), 9, True, step - 1),
    ]


def answers(problems: int, accuracy: float, rng: Generator) -> tuple[Answer, ...]:
    """Right with the given probability; problem 1 is answered with HOSTILE."""
    found = []
    for index in range(problems):
        prompt, gold = problem(index)
        right = bool(rng.random() < accuracy) and index != 1
        text = HOSTILE if index == 1 else f" {gold}" if right else f" {gold + int(rng.integers(1, 9))}. The sum of the two numbers"
        found.append(Answer(index, prompt, text, str(gold), right))
    return tuple(found)


def summarise(name: str, steps: int, seed: int, ranks: dict[str, int], before: Evaluation, after: Evaluation, learns: bool) -> RunSummary:
    """As the end of training does."""
    test, low, high = paired_test(before.correct, after.correct), before.accuracy, after.accuracy
    parameters = sum(rank * sum(WIDTHS[module.rpartition(".")[2]][1:]) for module, rank in ranks.items())
    return RunSummary(
        name=name,
        seed=seed,
        steps=steps,
        accuracy_before=low.value,
        accuracy_before_interval=(low.low, low.high),
        accuracy_after=high.value,
        accuracy_after_interval=(high.low, high.high),
        accuracy_gain=test.difference,
        accuracy_gain_interval=(test.low, test.high),
        mcnemar_p=test.p_value,
        learned=learns,
        train_seconds=10.9 * steps,
        tokens=460 * steps,
        peak_memory_bytes=3_280_000_000,
        trainable_parameters=parameters,
        rank_pattern=ranks,
        pass_at_k_before={},
        pass_at_k_after={},
    )


if __name__ == "__main__":
    print(write_report(make_run(Path(sys.argv[1]))))
