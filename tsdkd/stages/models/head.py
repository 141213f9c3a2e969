"""A model's output head without its body: read from its files with the first layer alone."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tsdkd.core import Head
from tsdkd.errors import InputError, first_line
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.layers import config_of_layers
from tsdkd.stages.models.spec import ModelSpec


def load_head(spec: ModelSpec, dtype: str) -> Head:
    """The head of a model without an adapter, in one precision on the CPU, cut to `spec.vocab` ids.

    transformers loads embedding, first layer and head, so the head's logits can be compared with the model's own; see
    `LanguageModel.head`. A quantised layer is read as random numbers, which serve that comparison as well. Raises
    InputError for a head that is quantised, and for one that is not linear with a scale and a softcap.
    """
    try:
        config = config_of_layers(AutoConfig.from_pretrained(spec.directory, trust_remote_code=False), [0])
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.directory,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers and safetensors raise errors of many types
        raise InputError(
            f"The head of {spec.name} cannot be loaded without its layers ({first_line(error)}).",
            "Use --engine transformers.",
        ) from None
    layer = model.get_output_embeddings()
    names = {name for name, value in model.named_parameters() if value is layer.weight}
    if names & {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}:
        raise InputError(f"The head of {spec.name} is quantised.", "Use a model whose head is saved in 16 or 32 bits.")
    return LanguageModel(spec.name, model.eval(), spec.tokenizer, shared_vocab=spec.vocab).head
