"""Configuration of `tsdkd train`."""

from dataclasses import dataclass
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig, recorded_chat_options
from tsdkd.stages.config.generate import MEMORY_FRACTION, PROMPT_COLUMNS, GenerateConfig
from tsdkd.stages.config.groups import ENGINE, LORA, MONITORING, OBJECTIVE, ONLINE, OPTIMIZER, REPLAY
from tsdkd.stages.config.objective import OBJECTIVE_OPTIONS
from tsdkd.stages.config.optimizer import DEFAULT_OPTIMIZER, OptimizerName
from tsdkd.stages.config.option import Option, default_in_words, nested, option, reuse
from tsdkd.stages.config.types import DTYPE_HELP, DType, QuantizedBits, attention_option
from tsdkd.stages.methods import METHODS, find_method

MAX_EPOCHS = 1_000_000
MICRO_BATCH_SIZE = 8
SHARED_MEMORY_FRACTION = 0.3
"""The fraction of its devices' memory that vLLM takes if training runs on them, too."""
ONLINE_SAMPLING = reuse(
    GenerateConfig,
    (
        *("limit", "column", "system", "temperature", "top_p", "max_new_tokens", "rollout_tokens", "stop"),
        *("max_prompt_tokens", "batch_size", "teacher_fraction", "teacher_by", "engine", "memory_fraction"),
    ),
    ONLINE,
    column={"shown": PROMPT_COLUMNS},
    temperature={"name": "sample-temperature"},
    batch_size={"name": "sample-batch-size"},
    teacher_fraction={
        "help": "The teacher's weight in the mixture that tokens are sampled from.",
        "shown": default_in_words(0, {name: method.teacher_fraction for name, method in METHODS.items()}),
    },
    memory_fraction={
        "help": "vLLM: fraction of the GPU's memory (or the machine's).",
        "shown": f"{SHARED_MEMORY_FRACTION}; with --rollout-gpus {MEMORY_FRACTION}",
    },
)
"""Options of sampling that online training has."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters instead of full fine-tuning; the names are peft's."""

    rank: int = option(16, "Rank of the adapters.", group=LORA, name="lora-rank", min_=1)
    alpha: int = option(32, "Scale of the adapters: alpha / rank.", group=LORA, name="lora-alpha", min_=1)
    dropout: float = option(0.0, "Dropout before the adapters, below 1.", group=LORA, name="lora-dropout", min_=0)
    targets: str = option("all-linear", "Modules, joined by commas.", group=LORA, name="lora-targets", metavar="NAMES")
    """"all-linear": every linear layer except the head."""
    merge: bool = option(False, "Save full weights instead of an adapter.", group=LORA)
    quantize: QuantizedBits | None = option(
        None, "Bits of the frozen weights (QLoRA); needs bitsandbytes.", group=LORA, shown="as loaded"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA's dropout is {self.dropout}.", "Choose a value in [0, 1).")


@dataclass(frozen=True)
class ReplayConfig:
    """When the student responds, and when its responses are trained on again: the schedule of DistiLLM."""

    phi: float = option(0.0, "Initial probability of the student's responses.", group=REPLAY, min_=0, max_=1)
    phi_step: float = option(
        0.1, "Increase of phi when the held-out divergence is too high.", group=REPLAY, min_=0, max_=1
    )
    replay_tolerance: float = option(
        0.1, "Nats by which the held-out divergence may exceed its reference.", group=REPLAY, min_=0
    )
    replay_capacity: int = option(1000, "Responses that the replay buffer holds.", group=REPLAY, min_=1)

    def __post_init__(self) -> None:
        if not (0 <= self.phi <= 1 and 0 <= self.phi_step <= 1):
            raise InputError(f"phi is {self.phi} and rises by {self.phi_step}.", "Choose values in [0, 1].")


@dataclass(frozen=True)
class OnlineConfig:
    """How responses are sampled during training, and how the teacher reads them; the paper's setting is lambda 1."""

    student_fraction: float = option(
        1.0,
        "Fraction of prompts that the student responds to; the others keep the responses of --rollouts.",
        group=ONLINE,
        name="lambda",
        shown=default_in_words(
            1, {name: float(method.online_responses and not method.uses_replay) for name, method in METHODS.items()}
        ),
    )
    sampling: GenerateConfig = nested(GenerateConfig, default_factory=GenerateConfig, options=ONLINE_SAMPLING)
    """The student responds alone (policy "student") or with the teacher ("teacher-mixed"). `dtype` has no effect:
    training decides the precision."""
    teacher_dtype: DType = option("auto", f"Teacher: {DTYPE_HELP[0].lower()}{DTYPE_HELP[1:]}", group=ONLINE)
    teacher_device: str | None = option(
        None, "Device of the teacher, such as cpu. auto: spread over all.", group=ONLINE, shown="the student's"
    )
    teacher_top_k: int | None = option(
        None, "With --teacher-url: teacher log-probabilities per token.", group=ONLINE, min_=1, shown="20"
    )
    rollout_url: str | None = option(
        None, "vLLM server on this machine that samples the responses.", group=ONLINE, metavar="URL", shown="none"
    )
    rollout_gpus: int | None = option(
        None,
        "GPUs without a training process on which vLLM samples the responses.",
        group=ONLINE,
        min_=1,
        shown="vLLM shares the GPUs of training",
    )
    rollout_ahead: int = option(
        0,
        "With 1, vLLM samples the responses of the next step while the student learns those of this step.",
        group=ONLINE,
        min_=0,
        max_=1,
    )
    """1: responses are one update older than the student that learns them, except in a run's first step."""
    replay: ReplayConfig | None = nested(ReplayConfig, default=None)
    """Decides when the student responds, in place of `student_fraction`; None: no response is replayed."""

    @property
    def samples_responses(self) -> bool:
        """Whether responses are sampled during training; if not, all prompts keep those of the rollouts."""
        return bool(self.student_fraction or self.replay)

    @property
    def teacher_fraction(self) -> float:
        """The teacher's weight in the mixture that responses are sampled from."""
        return self.sampling.teacher_fraction if self.sampling.policy == "teacher-mixed" else 0.0

    @property
    def vllm_shares_devices(self) -> bool:
        """Whether vLLM runs on the devices that train."""
        return self.sampling.engine == "vllm" and not (self.rollout_url or self.rollout_gpus)

    @property
    def memory_fraction(self) -> float:
        """The fraction of its devices' memory that vLLM takes."""
        if (given := self.sampling.memory_fraction) is not None:
            return given
        return SHARED_MEMORY_FRACTION if self.vllm_shares_devices else MEMORY_FRACTION

    def __post_init__(self) -> None:
        if not 0 <= self.student_fraction <= 1:
            raise InputError(
                f"lambda is {self.student_fraction}.",
                "Choose a fraction in [0, 1]; 1 is the paper's on-policy setting.",
            )
        if self.rollout_url and self.rollout_gpus:
            raise InputError("--rollout-url and --rollout-gpus are both given.", "Give one of them.")
        if self.rollout_ahead not in {0, 1}:
            raise InputError(f"--rollout-ahead is {self.rollout_ahead}.", "Choose 0 or 1.")
        if self.replay and self.rollout_ahead:
            raise InputError(
                "The replay schedule decides each step's responses when it begins.", "Leave out --rollout-ahead."
            )
        if self.replay and self.student_fraction:
            raise InputError("The replay schedule decides when the student responds.", "Leave out --lambda.")


@dataclass(frozen=True)
class TrainConfig:
    """How the student learns; the defaults are those of Table 10."""

    method: str = option(
        "tsdkd",
        f"Way to distil: {', '.join(METHODS)}, a Python file, or a method of an installed package.",
        group=OBJECTIVE,
        metavar="NAME",
        common=True,
    )
    method_options: tuple[str, ...] = option(
        (),
        "Option that the method declares, such as share=0.3; repeatable.",
        group=OBJECTIVE,
        name="method-option",
        metavar="NAME=VALUE",
        repeatable=True,
    )
    objective: TSDKDConfig = nested(TSDKDConfig, options=OBJECTIVE_OPTIONS)
    online: OnlineConfig | None = nested(OnlineConfig, default=None)
    """None: offline training, from recorded scores and without the teacher."""
    lora: LoRAConfig | None = nested(
        LoRAConfig, default=None, switch=Option("Train LoRA adapters instead of all weights.", LORA, common=True)
    )
    """None: all weights are trained."""
    chat: ChatConfig = nested(ChatConfig, options=recorded_chat_options(without_rollouts=True))
    """With rollouts: theirs, or unset, which stands for it. The checkpoint's tokenizer gets it."""
    optimizer: OptimizerName = option(DEFAULT_OPTIMIZER, "Optimizer, by transformers' name.", group=OPTIMIZER)
    learning_rate: float = option(5e-6, "Peak learning rate.", group=OPTIMIZER, min_=0, common=True)
    epochs: float = option(3.0, "Passes over the data, above 0.", group=OPTIMIZER, common=True)
    batch_size: int = option(
        128, "Responses per optimizer step, over all processes.", group=OPTIMIZER, min_=1, common=True
    )
    micro_batch_size: int | None = option(
        None,
        "Responses per forward and process; the result stays the same.",
        group=ENGINE,
        min_=1,
        shown=f"{MICRO_BATCH_SIZE}, without --micro-batch-tokens",
    )
    """Changes the result only with `objective.released`, whose opener and entropy terms span a micro-batch."""
    micro_batch_tokens: int | None = option(
        None,
        "Tokens per forward and process, in place of --micro-batch-size: sequences are packed without padding.",
        group=ENGINE,
        min_=1,
        shown="padded micro-batches",
    )
    warmup_ratio: float = option(
        0.1, "Fraction of steps in which the learning rate rises.", group=OPTIMIZER, min_=0, max_=1
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = option(
        "cosine", "Schedule of the learning rate.", group=OPTIMIZER
    )
    weight_decay: float = option(0.0, "Weight decay.", group=OPTIMIZER, min_=0)
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped, above 0.", group=OPTIMIZER, min_=0)
    precision: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "Precision of the forward; weights stay float32. auto: bfloat16 if the hardware has it.", group=ENGINE
    )
    gradient_checkpointing: bool = option(False, "Save memory with a second forward.", group=ENGINE)
    compile: bool = option(
        False, "Fuse the objective's kernels: C++ on a CPU, Triton on a GPU; needs --signal hidden.", group=ENGINE
    )
    attention: str | None = attention_option()
    held_out: float = option(
        0.0,
        "Fraction of prompts that is measured on and never trained on.",
        group=MONITORING,
        min_=0,
        max_=1,
        common=True,
    )
    eval_steps: int = option(
        0, "Steps between measurements; the best measured step is kept.", group=MONITORING, min_=0, common=True
    )
    """0: no measurements."""
    stop_on_degeneration: bool = option(
        False, "Stop a run that degenerates; the checkpoint is its best measured or last saved step.", group=MONITORING
    )
    save_steps: int = option(
        100, "Steps between saves; an interruption loses the steps after the last one.", group=MONITORING, min_=1
    )
    """With `eval_steps`, every measurement saves instead."""
    trackers: tuple[str, ...] = option(
        (),
        "Tracker that gets every log: tensorboard, trackio or wandb; repeatable.",
        group=MONITORING,
        name="tracker",
        metavar="NAME",
        repeatable=True,
    )

    @property
    def quantize(self) -> QuantizedBits | None:
        """Bits of the frozen weights; None for weights as loaded, and where all weights are trained."""
        return self.lora.quantize if self.lora else None

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
            ("epochs", 0 < self.epochs <= MAX_EPOCHS, f"above 0, up to {MAX_EPOCHS:,}"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0; a large one switches clipping off"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")
        if self.micro_batch_size and self.micro_batch_tokens:
            raise InputError("--micro-batch-size and --micro-batch-tokens are both given.", "Give one of them.")
        if bool(self.held_out) != bool(self.eval_steps):
            raise InputError("--held-out and --eval-steps belong together.", "Give both, or neither.")
        method = find_method(self.method)
        method.require_objective(self.objective)
        method.read_options(self.method_options)
        self._require_schedule()

    def _require_schedule(self) -> None:
        replay = self.online and self.online.replay
        if find_method(self.method).uses_replay and not replay:
            raise InputError(f"{self.method} needs online training.", "Give --teacher and --rollouts.")
        if replay and not find_method(self.method).uses_replay:
            raise InputError(f"{self.method} has no replay schedule.", "Leave it out, or choose distillm.")
        if replay and not self.eval_steps:
            raise InputError(
                f"The schedule of {self.method} follows the held-out divergence.", "Give --held-out and --eval-steps."
            )
        if replay and replay.replay_capacity < self.batch_size:
            raise InputError(
                f"A replay buffer of {replay.replay_capacity} responses cannot fill a batch of {self.batch_size}.",
                "Raise --replay-capacity, or lower --batch-size.",
            )
