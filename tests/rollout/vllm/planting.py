"""A worker that can be told to go wrong, for tests (--worker-extension-cls)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlora.rollout.vllm.weight_engine import WeightUpdateWorker


class PlantingWorker(WeightUpdateWorker):
    """The real worker and its faults."""

    def plant_other_head(self) -> None:
        """Packs the tied head from weights that are not those of the embedding."""
        head = self.model_runner.get_model().lm_head
        table = head.weight
        head.weight = torch.nn.Parameter(table + 1, requires_grad=False)
        head.quant_method.process_weights_after_loading(head)
        head.weight = table

    def plant_failing_loader(self) -> None:
        """The model's own loader breaks off in the middle."""
        model = self.model_runner.get_model()
        load = model.load_weights

        def half(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            load(list(weights)[:5])
            raise RuntimeError("planted")

        model.load_weights = half
