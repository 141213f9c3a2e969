"""A logits processor for vLLM: rows of the head that stand for no token are never sampled. vLLM loads it by name."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


class MaskPaddingRows(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vocabulary = int(vllm_config.additional_config["tsdkd_vocabulary"])

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the requests."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, self.vocabulary :] = -torch.inf
        return logits
