"""What runs inside vLLM's worker process: adapters from shared memory, checksums of what the kernels read. `--worker-extension-cls`.

The client calls these methods over HTTP (/collective_rpc). They take and return what JSON can carry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from fastlora.rollout.vllm.adapter_memory import INDEX_FILE, checksum, read_shared
from fastlora.rollout.vllm.weight_engine import WeightUpdateWorker


class FastloraWorker(WeightUpdateWorker):
    """Mixed into vLLM's Worker, whose attributes it uses."""

    fastlora_ids: dict[str, int]
    """Name of every adapter that was loaded -> vLLM's number for it."""

    def fastlora_prepare(self) -> None:
        """Once after the start: the loader, and the two CPU fixes where the device is a CPU. The engine's log names them."""
        on_cpu = self.model_runner.device.type == "cpu"
        if on_cpu:
            from fastlora.rollout.vllm import cpu_idle

            cpu_idle.install()
            print("fastlora: the worker sleeps between requests (rollout/vllm/cpu_idle.py)", flush=True)
        manager = getattr(self.model_runner, "lora_manager", None)
        if manager is None:  # an engine without adapters: its weights are updated
            return
        self.fastlora_ids = {}
        from_files = manager._load_adapter

        def load(request: LoRARequest) -> LoRAModel:
            shared = Path(request.lora_path)
            adapter = _from_memory(request, shared) if (shared / INDEX_FILE).is_file() else from_files(request)
            cached = {name: number for name, number in self.fastlora_ids.items() if number in manager.list_adapters()}
            self.fastlora_ids = cached | {request.lora_name: request.lora_int_id}
            return adapter

        manager._load_adapter = load
        if on_cpu:
            from fastlora.rollout.vllm import cpu_lora  # imports vLLM's CPU kernels

            cpu_lora.install()
            print("fastlora: LoRA by one product per adapter's run of tokens (rollout/vllm/cpu_lora.py)", flush=True)

    def fastlora_checksums(self, adapter: str, ranks: dict[str, int]) -> dict[str, list[int]]:
        """Module -> [checksum of A, checksum of B] of an adapter as it lies in the slots.

        ranks: of the adapter's modules. What is absent has a slot of zeros; [-1, -1] stands for entries that are not 0 beyond the rank.
        Raises KeyError when the adapter is in no slot.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        number = self.fastlora_ids.get(adapter)
        if number is None or number not in manager.lora_index_to_id:
            raise KeyError(f"adapter {adapter} is in no slot of the engine; the slots hold {manager.lora_index_to_id}")
        slot = manager.lora_index_to_id.index(number)
        found = {}
        for module, layer in manager.modules.items():
            if not isinstance(layer.lora_a_stacked, tuple):  # the embedding and the head, which fastlora does not adapt
                continue
            for name, a, b in zip(_members(manager, module), layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                rank = ranks.get(name, 0)
                a_rd, b_nr = a[slot, 0], b[slot, 0]
                if bool(a_rd[rank:].any()) or bool(b_nr[:, rank:].any()):
                    found[name] = [-1, -1]
                elif rank:
                    found[name] = [checksum(a_rd[:rank]), checksum(b_nr[:, :rank])]
        return found

    def fastlora_forget(self, adapter: str) -> None:
        """Frees the slot of an adapter now, if it has one, instead of when the next adapter needs it."""
        number = self.fastlora_ids.pop(adapter, None)
        if number is not None:
            self.model_runner.lora_manager.remove_adapter(number)

    def fastlora_adapters(self) -> dict[str, Any]:
        """Numbers of the adapters in slots and in the cache, the names that are remembered, and this process's resident bytes."""
        import psutil

        manager = self.model_runner.lora_manager._adapter_manager
        return {
            "slots": list(manager.lora_index_to_id),
            "cached": sorted(manager.list_adapters()),
            "names": sorted(self.fastlora_ids),
            "resident_bytes": psutil.Process().memory_info().rss,
        }


def _from_memory(request: LoRARequest, folder: Path) -> LoRAModel:
    modules = read_shared(folder)
    weights = {m.name: LoRALayerWeights(m.name, len(m.a_rd), len(m.a_rd), m.a_rd, m.b_nr, scaling=1.0) for m in modules}
    return LoRAModel(request.lora_int_id, max(len(m.a_rd) for m in modules), weights)


def _members(manager: Any, module: str) -> list[str]:
    """The Hugging Face names of the slices of vLLM's module: qkv_proj -> q_proj, k_proj, v_proj."""
    return manager.packed_modules.get(module, [module])
