"""The model that eval measures, loaded for held-out responses and for lm-eval."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.engines.vllm_engine import translate_vllm_errors
from tsdkd.stages.models.chat import turn_end_ids
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import Observer


class EvaluatedModel:
    """A model by name; each of its two forms is loaded at its first use."""

    def __init__(
        self,
        name: str,
        config: EvalConfig,
        chat: bool,
        observer: Observer,
        make_parallel_model: Callable[[], Any] | None = None,
    ) -> None:
        """`make_parallel_model`: makes lm-eval's model whose requests workers run; None: it is loaded here."""
        self.name, self.config, self.observer, self.chat = name, config, observer, chat
        self.make_parallel_model = make_parallel_model
        self.turn_end_ids = turn_end_ids(load_tokenizer(name, config.chat)) if chat else []

    @cached_property
    def language_model(self) -> LanguageModel:
        config = self.config
        return load_model(self.name, config.dtype, attention=config.attention, observer=self.observer, chat=config.chat)

    @cached_property
    def lm_eval_model(self) -> Any:
        model = self._load_lm_eval_model()
        if self.chat:
            model.add_bos_token = False  # the chat template writes the BOS token, if the model reads one
        return model

    def _load_lm_eval_model(self) -> Any:
        config = self.config
        if self.make_parallel_model or config.engine == "vllm":
            vars(self).pop("language_model", None)  # vLLM and workers need its memory
        if self.make_parallel_model:
            return self.make_parallel_model()
        if config.engine == "vllm":
            with translate_vllm_errors():
                from tsdkd.stages.eval.lm_eval_vllm import VllmModel

                return VllmModel(self.name, config, self.turn_end_ids)
        from tsdkd.stages.eval.lm_eval_transformers import TransformersModel

        context = min(config.max_length or self.language_model.context, self.language_model.context)
        return TransformersModel(self.language_model, context, config.batch_size, self.turn_end_ids)

    def close(self) -> None:
        if "lm_eval_model" in vars(self):
            self.lm_eval_model.close()
