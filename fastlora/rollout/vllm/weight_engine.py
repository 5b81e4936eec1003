"""Inside vLLM's worker: new weights from a shared file through vLLM's own loaders, and checksums of what its kernels read.

vLLM keeps q, k, v as one matrix qkv_proj and gate, up as gate_up_proj; on a CPU it packs them for oneDNN and throws the originals away. An
update runs vLLM's layerwise reload on the modules that it names: buffers, copies, packs. What was packed is read back as the product with
the identity,

    I Wᵀ = Wᵀ          every sum has one term that is not 0: exact in every dtype, −0 aside

so a checksum is of what the next token will be multiplied by, not of what was handed in.

Importing this module registers the backend "fastlora" of --weight-transfer-config; --worker-extension-cls imports it before the model is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fastlora.rollout.vllm.adapter_memory import checksum
from fastlora.rollout.vllm.weight_files import WeightFileError, WeightIndex, columns_of, read_weights

BACKEND = "fastlora"

TIED_COPIES_DIFFER = -1
"""Instead of a checksum (which is never negative): the embedding's table and the packed head, which are one tensor, are not the same."""

IDENTITY_ROWS = 512
"""Of the product that reads a packed matrix back: 512 rows keep the GEMM efficient and its output small beside the matrix."""


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter of one vLLM module, and the Hugging Face tensors that it consists of, from row 0 on."""

    module: Any
    parameter: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    row_shape: tuple[int, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensor."""
        return {name: (rows, *self.row_shape) for name, rows in zip(self.names, self.rows, strict=True)}

    def tensors(self, dtype: torch.dtype, part: int, parts: int) -> dict[str, Tensor]:
        """Name -> what the kernels read, in the model's dtype (vLLM widens some biases), +0 for −0; of a matrix the columns of a part."""
        if self.row_shape and self.parameter == "weight" and isinstance(self.module, LinearBase | ParallelLMHead):
            whole = _read_back(self.module, self.row_shape[0], dtype, part, parts)
        else:
            whole = self.module.get_parameter(self.parameter)
            if self.row_shape:
                whole = whole[:, columns_of(self.row_shape[0], part, parts)]
        return dict(zip(self.names, (whole[: sum(self.rows)].to(dtype) + 0.0).split(self.rows), strict=True))


def places(model: nn.Module) -> list[Place]:
    """Where each tensor of the checkpoint lies; a head that is tied to the embedding has no place of its own."""
    found = []
    fused: Any = getattr(model, "packed_modules_mapping", {})
    heads = set(_tied_heads(model))
    for path, module in model.named_modules():
        hf_path = path.removesuffix(".base_layer")  # LoRA wraps the layer
        parent, _, last = hf_path.rpartition(".")
        for parameter, value in module.named_parameters(recurse=False):
            if isinstance(module, VocabParallelEmbedding):
                if module in heads:
                    continue
                found.append(Place(module, parameter, (f"{hf_path}.{parameter}",), (module.org_vocab_size,), (module.embedding_dim,)))
            elif isinstance(module, LinearBase):
                members = [f"{parent}.{member}" for member in fused.get(last, [last])]
                row_shape = (module.input_size,) if parameter == "weight" else ()
                names = tuple(f"{member}.{parameter}" for member in members)
                found.append(Place(module, parameter, names, tuple(module.output_partition_sizes), row_shape))
            else:
                found.append(Place(module, parameter, (f"{hf_path}.{parameter}",), (value.shape[0],), tuple(value.shape[1:])))
    return found


def _tied_heads(model: nn.Module) -> Iterator[ParallelLMHead]:
    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and any(module.weight is table.weight for table in tables):
            yield module


def _read_back(module: Any, width: int, dtype: torch.dtype, part: int, parts: int) -> Tensor:
    """Columns of the matrix [n, width] that a layer multiplies by: of its weight, or of I Wᵀ where vLLM has packed it."""
    columns = columns_of(width, part, parts)
    if not hasattr(module, "cpu_linear"):
        return module.weight[:, columns]
    identity = torch.eye(width, dtype=dtype)[columns]
    return torch.cat([module.quant_method.apply(module, rows, None).t() for rows in identity.split(IDENTITY_ROWS)], dim=1)


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """`update_info` of /update_weights."""

    folder: str
    """Where `write_weights` wrote; seen by the engine under the same path."""
    version: str
    """That must lie there."""


class FileWeightEngine(WeightTransferEngine):
    """Backend "fastlora". Everything is checked before the first weight is touched: after a WeightFileError the engine is what it was."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        if vllm_config.parallel_config.world_size > 1:
            raise ValueError("weights from a shared file reach one worker; tensor and pipeline parallel engines are not served")
        self._places = places(model)
        self._received = False
        self._broken: str | None = None

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Raises RuntimeError when an earlier update broke off while weights were being replaced."""
        if self._broken:
            raise RuntimeError(f"the engine's weights are half replaced, restart it: {self._broken}")
        self._received = False

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Loads the file. Raises WeightFileError before anything is changed."""
        index, tensors = read_weights(Path(update_info.folder))
        if index.version != update_info.version:
            raise WeightFileError(f"{update_info.folder} holds version {index.version}, not {update_info.version}")
        self._refuse_misfits(index)
        modules = {place.module: None for place in self._places if any(name in tensors for name in place.names)}
        try:
            for module in modules:
                initialize_layerwise_reload(module)
            self.model.load_weights(tensors.items())
            for module in modules:
                finalize_layerwise_reload(module, self.model_config)
            # vLLM 0.32 packs a tied head once and forgets it when the embedding is loaded again: log-probs off by 2.7 on a CPU.
            for head in _tied_heads(self.model):
                head.quant_method.process_weights_after_loading(head)
        except Exception as error:
            self._broken = f"version {index.version}: {error}"
            raise
        self._received = True

    def finish_weight_update(self) -> None:
        """Raises RuntimeError when nothing was received: a new version must not be stamped on old weights."""
        if not self._received:
            raise RuntimeError("no weights have been received since start_weight_update")

    def shutdown(self) -> None:
        """Nothing is held open."""

    def _refuse_misfits(self, index: WeightIndex) -> None:
        if index.dtype != self.model_config.dtype:
            raise WeightFileError(f"version {index.version} is in {index.dtype}, the engine runs in {self.model_config.dtype}")
        shapes = {name: shape for place in self._places for name, shape in place.shapes().items()}
        stored = {tensor.name: tensor.shape for tensor in index.tensors}
        for name, shape in stored.items():
            if shapes.get(name) != shape:
                own = shapes.get(name, "no such tensor")
                raise WeightFileError(f"version {index.version} has {name} {shape}; the engine's model has {own}")
        # A module is loaded whole: vLLM would leave the rows of a slice that is missing uninitialised.
        touched = {place.module for place in self._places if stored.keys() & set(place.names)}
        needed = [p for p in self._places if index.complete or (p.module in touched and p.parameter == "weight")]
        for name in (name for place in needed for name in place.names):
            if name not in stored:
                raise WeightFileError(f"version {index.version} lacks {name}, which the engine needs to load what is there")


class WeightUpdateWorker:
    """Mixed into vLLM's Worker by --worker-extension-cls; called over /collective_rpc."""

    model_runner: Any
    start_weight_update: Any
    update_weights: Any
    finish_weight_update: Any

    def fastlora_update_weights(self, folder: str, version: str) -> str:
        """vLLM's start, update and finish in one call. Returns why the file was refused, or "".

        An answer and not an exception: vLLM makes any exception a status 500, which means a broken engine, and hangs up.
        """
        self.start_weight_update()
        try:
            self.update_weights({"folder": folder, "version": version})
        except WeightFileError as error:
            return str(error)
        self.finish_weight_update()
        return ""

    @torch.inference_mode()
    def fastlora_weight_checksums(self, names: list[str] | None = None, part: int = 0, parts: int = 1) -> dict[str, int]:
        """Hugging Face name -> checksum of what the kernels read, of all or of `names`; see part_checksums and TIED_COPIES_DIFFER."""
        model, dtype = self.model_runner.get_model(), self.model_runner.model_config.dtype
        heads = list(_tied_heads(model))
        found: dict[str, int] = {}
        for place in places(model):
            if names is not None and not set(names) & set(place.names):
                continue
            found |= {name: checksum(tensor) for name, tensor in place.tensors(dtype, part, parts).items()}
            if any(place.module.get_parameter(place.parameter) is head.weight for head in heads):
                [name], [rows] = place.names, place.rows
                copies = {checksum(_read_back(head, place.row_shape[0], dtype, part, parts)[:rows]) for head in heads}
                if copies != {found[name]}:
                    found[name] = TIED_COPIES_DIFFER
        return found


WeightTransferEngineFactory.register_engine(BACKEND, FileWeightEngine)
