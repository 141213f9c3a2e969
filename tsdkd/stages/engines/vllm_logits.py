"""A logits processor for vLLM, which imports it by its dotted path."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


class MaskPaddingRows(LogitsProcessor):
    """Excludes the head's padding rows from sampling: ids past the tokenizer's last."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vocab_size = int(vllm_config.additional_config["tsdkd_vocab_size"])

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Keep no state: every request gets the same mask."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, self.vocab_size :] = -torch.inf
        return logits
