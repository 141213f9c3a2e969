"""Models as lm-eval asks them, on vLLM. Imports vLLM, so it is imported late."""

import json
from pathlib import Path
from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from tsdkd.stages.answerers import Attentive

ADAPTER = "adapter_config.json"


class OnVLLM(Attentive, VLLM):
    """lm-eval's class for vLLM; a LoRA adapter is laid over its base."""

    def __init__(self, directory: Path, dtype: str, max_length: int | None, batch_size: int | None) -> None:
        super().__init__(
            dtype=dtype,
            max_length=max_length,
            batch_size=batch_size or "auto",
            **_adapter(directory) if (directory / ADAPTER).is_file() else {"pretrained": str(directory)},
        )
        self.listen(batch_size)

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.notes.cut.extend(output.outputs[0].finish_reason == "length" for output in outputs)
        return outputs


def _adapter(directory: Path) -> dict[str, Any]:
    settings = json.loads((directory / ADAPTER).read_text())
    return {
        "pretrained": settings["base_model_name_or_path"],
        "lora_local_path": str(directory),
        "max_lora_rank": settings["r"],
    }
