"""What every report says of its circumstances, and what its plan needs to know of the model before any run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastlora.config import RunConfig
from fastlora.lora.groups import projections, shapes
from fastlora.lora.patterns import resolve
from fastlora.metrics import environment, processor_name
from fastlora.model import meta_model
from fastlora.study.config import StudyConfig
from fastlora.study.results import CellResult


def adapted_modules(config: RunConfig) -> tuple[str, ...]:
    """Full names of all target modules of the config's model, rank 0 included, in the model's order; no weights are loaded."""
    everything = config.lora.model_copy(update={"rank_budget": None, "parameter_budget": None, "rank_pattern": {}, "r": 1})
    return tuple(spec.name for spec in resolve(shapes(projections(meta_model(config.model))), everything))


def machine_and_commit() -> dict[str, str]:
    """Processor or GPU, and the commit of this checkout."""
    found = environment()
    device = processor_name() if found["device"] == "cpu" else found["device"]
    return {"commit": found["commit"] or "not a git checkout", "machine": f"{device}, {found['cpu_count']} CPU cores"}


def setting(study: StudyConfig, command: str, cells: Iterable[CellResult]) -> Mapping[str, str]:
    """The report's setting: command, commit, machine, problems, seeds, scale, steps, batch."""
    run = study.base_run()
    items = sorted({cell.accuracy.n for cell in cells})
    minutes = sum(sum(cell.seconds.values()) for cell in cells) / 60
    return {
        "command": command,
        **machine_and_commit(),
        "items": ", ".join(map(str, items)) or "none",
        "seeds": ", ".join(map(str, study.seeds)),
        "scale": f"{run.model.name} on {run.data.source}, {run.model.dtype}",
        "steps": f"{run.trainer.steps} of {run.rollout.num_prompts} prompts × {run.rollout.num_generations} completions",
        "training time": f"{minutes:.1f} minutes in all",
    }
