"""A whole training step on the card: captured in a CUDA graph and replayed, and beside the same step on the CPU."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.registry import dispatchers, implementation_counts, use_implementation
from tests.gpu.training_step import LEARNING_RATE, TrainingStep
from tests.ops.implementations import relative_error
from tests.tolerances import GPU_STEP_IN_FLOAT32

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_replayed_graph_has_the_bits_of_the_eager_step(dtype: torch.dtype, one_pass: bool) -> None:
    """Loss, gradient, moments and parameters; the graph is replayed twice from the same state."""
    step = TrainingStep(GPU, dtype, one_pass=one_pass)
    start = [x.clone() for x in step.state]

    def restore() -> None:
        for x, before in zip(step.state, start, strict=True):
            x.copy_(before)

    with torch.cuda.stream(stream := torch.cuda.Stream()):  # kernels are compiled and tables made before the capture
        for _ in range(3):
            restore()
            eager_loss = step()
    torch.cuda.current_stream().wait_stream(stream)
    eager = [eager_loss.clone(), *(x.clone() for x in step.state)]
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_loss = step()
    for _ in range(2):
        restore()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, [graph_loss, *step.state], eager))


def test_step_is_that_of_the_cpu() -> None:
    """float32 without TF32."""
    assert_is_that_of_the_cpu(TrainingStep(GPU, torch.float32))


def assert_is_that_of_the_cpu(step: TrainingStep) -> None:
    """Loss, gradient of every matrix, first step of AdamW; and Triton ran wherever an op has it."""
    before = implementation_counts.copy()
    loss = step()
    ran = implementation_counts - before
    by_triton = {op for op, name in ran if name == "triton"}
    assert by_triton == {op for op, _ in ran if "triton" in dispatchers[op].implementations} >= {"lora_linear", "lora_linear_backward"}
    cpu = TrainingStep(torch.device("cpu"), torch.float32)
    with use_implementation("torch"):
        assert abs(float(loss) - float(cpu())) <= GPU_STEP_IN_FLOAT32
    ours, theirs = step.adapter.flat, cpu.adapter.flat
    for segment in theirs.segments:
        place = slice(segment.offset, segment.offset + segment.numel)
        assert relative_error(ours.grad[place].cpu(), theirs.grad[place]) <= GPU_STEP_IN_FLOAT32, segment.name
    # AdamW's first step is lr · sign(g): where g is as small as its rounding error, the sign is luck.
    moved_otherwise = (ours.data.cpu() - theirs.data).abs() > 0.5 * LEARNING_RATE
    assert float(moved_otherwise.float().mean()) <= 1e-3
