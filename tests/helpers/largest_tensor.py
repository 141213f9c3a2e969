"""The number of elements of the largest tensor that any operation returns, while a block runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: object, types: object, args: object = (), kwargs: object = None) -> object:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result
