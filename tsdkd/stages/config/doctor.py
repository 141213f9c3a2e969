"""Configuration of `tsdkd doctor`."""

from dataclasses import dataclass

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.generate import PROMPT_COLUMNS, GenerateConfig
from tsdkd.stages.config.groups import DATA, OPTIMIZER, SAMPLING
from tsdkd.stages.config.objective import OBJECTIVE_OPTIONS
from tsdkd.stages.config.option import declared_options, nested, option, reuse
from tsdkd.stages.config.train import TrainConfig

CPU_SAMPLE_TOKENS = 64
"""Tokens of the longest sampled response on a CPU, by default."""
SAMPLING_FIELDS = (
    *("temperature", "top_p", "max_new_tokens", "stop", "max_prompt_tokens", "system", "limit", "column"),
    *("config_name", "split", "batch_size", "dtype", "attention"),
)
OBJECTIVE_FIELDS = ("alpha", "direct_weight", "em_weight", "k", "opener", "tau")


@dataclass(frozen=True)
class DoctorConfig:
    """The number and length of sampled responses, and the settings of the planned run."""

    sample: int = option(32, "Prompts that each model responds to.", group=SAMPLING, min_=1, common=True)
    sample_tokens: int | None = option(
        None,
        "Longest sampled response, in tokens.",
        group=SAMPLING,
        min_=1,
        common=True,
        shown=f"--max-new-tokens; on a CPU at most {CPU_SAMPLE_TOKENS}",
    )
    sampling: GenerateConfig = nested(
        GenerateConfig,
        options={name: declared_options(GenerateConfig)[name] for name in SAMPLING_FIELDS}
        | reuse(GenerateConfig, ("column",), DATA, column={"shown": PROMPT_COLUMNS}),
    )
    """The options of `generate`; doctor samples with transformers."""
    chat: ChatConfig = nested(ChatConfig)
    objective: TSDKDConfig = nested(TSDKDConfig, options={name: OBJECTIVE_OPTIONS[name] for name in OBJECTIVE_FIELDS})
    learning_rate: float = option(
        TrainConfig.learning_rate, "Peak learning rate of the run.", group=OPTIMIZER, min_=0, common=True
    )

    def response_limit(self, device: str) -> int:
        """The longest response that is sampled on this kind of device, in tokens."""
        longest = self.sampling.max_new_tokens
        if self.sample_tokens is None:
            return min(longest, CPU_SAMPLE_TOKENS) if device == "cpu" else longest
        return min(longest, self.sample_tokens)
