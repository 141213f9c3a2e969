"""The weights of vLLM's `LLM` in the child process: read from files, or asleep.

Only GPUs have sleep; its calls are those of vLLM's page "Sleep Mode".
"""

from pathlib import Path
from typing import Any


class VllmWeights:
    """Each public method is the name of a `WeightCommand`."""

    def __init__(self, llm: Any, lora: Any) -> None:
        """`lora`: vLLM's request for the adapter that responses are sampled with, or None."""
        self.llm, self.lora = llm, lora
        self._asleep = False

    def load(self, directory: Path) -> None:
        """Read all weights from the safetensors files of a directory; an adapter was made for those before."""
        self._wake_up(["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        self._wake_up(["kv_cache"])
        self._asleep = False
        self.lora = None

    def load_adapter(self, directory: Path) -> None:
        """Read the adapter from a directory, in place of the one before."""
        from vllm.lora.request import LoRARequest

        self._wake_up(None)
        self._asleep = False
        self.llm.llm_engine.add_lora(LoRARequest("adapter", 1, str(directory), load_inplace=True))
        self.lora = LoRARequest("adapter", 1, str(directory))  # load_inplace here would read the file for each batch

    def sleep(self, level: int) -> None:
        """Free the GPU's memory. Level 1 keeps the weights in main memory; 2 drops them, so new ones must follow."""
        self.llm.sleep(level=level)
        self._asleep = True

    def _wake_up(self, tags: list[str] | None) -> None:
        if self._asleep:
            self.llm.wake_up(tags=tags)
