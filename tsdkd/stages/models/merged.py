"""Adapters merged into their base models, as the directory of a whole model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig

from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.saved_adapters import attach_adapter
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.models.weights import check_saved_values


@contextmanager
def merged_model_directory(name: str, dtype: DType) -> Iterator[Path]:
    """The directory of a model; for an adapter, a temporary directory with the merged weights.

    Raises InputError when the adapter does not fit its base model, and unless all weights are finite in `dtype`.
    """
    spec = load_spec(name)
    if spec.adapter is None:
        check_saved_values(name, spec.directory, dtype)
        yield spec.directory
        return
    with TemporaryDirectory(prefix="tsdkd-merged-") as directory:
        base: Any = load_model(str(spec.directory), "float32", "cpu").model
        parameters = set(base.state_dict())
        adapted = attach_adapter(base, spec.adapter)
        try:
            model = adapted.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{name} cannot be merged into its base model ({first_line(error)}).", "Use --engine transformers."
            ) from None
        if added := set(model.state_dict()) - parameters:
            raise InputError(
                f"{name} adds {min(added)} to its base model, which this architecture cannot save.",
                "Use --engine transformers.",
            )
        model.generation_config = GenerationConfig(eos_token_id=spec.end_ids)  # transformers may refuse to save others
        model.to(getattr(torch, spec.resolve_dtype(dtype))).save_pretrained(directory)
        spec.tokenizer.save_pretrained(directory)
        del base, adapted, model
        check_saved_values(name, Path(directory), dtype)
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # its entries are named by this temporary directory
        yield Path(directory)
