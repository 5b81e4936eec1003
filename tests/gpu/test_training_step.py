"""A whole training step on the card: captured in a CUDA graph and replayed, and beside the same step on the CPU."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.registry import dispatchers, implementation_counts
from tests.gpu.training_step import TrainingStep
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
    """float32 without TF32: loss, gradient of every matrix, first step of AdamW; and Triton ran wherever an op has it."""
    cpu, gpu = (TrainingStep(device, torch.float32) for device in (torch.device("cpu"), GPU))
    before = implementation_counts.copy()
    loss = gpu()
    ran = {name for name, _ in implementation_counts - before}
    triton = {op for op, name in implementation_counts - before if name == "triton"}
    assert triton == {op for op in ran if "triton" in dispatchers[op].implementations} >= {"lora_linear", "lora_linear_backward"}
    assert abs(float(loss - cpu().cuda())) <= GPU_STEP_IN_FLOAT32
    for segment in cpu.adapter.flat.segments:
        place = slice(segment.offset, segment.offset + segment.numel)
        assert relative_error(gpu.adapter.flat.grad[place].cpu(), cpu.adapter.flat.grad[place]) <= GPU_STEP_IN_FLOAT32, segment.name
    moved = cpu.adapter.flat.data - gpu.adapter.flat.data.cpu()
    # AdamW's first step is lr · sign(g): where g is as small as its rounding error, the sign is luck.
    assert float((moved.abs() > 0.5e-3).float().mean()) <= 1e-3
