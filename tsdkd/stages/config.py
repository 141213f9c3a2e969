"""What each stage can be told, with the defaults the command line shows; loads without torch.

An artifact records them as its configuration, and another value is another artifact (but for what changes speed
alone, and where a run is saved and logged). Where something is read or written is an argument of the stage.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.objectives import find

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations; "auto" is as it was saved; float32 on CPUs without bf16."""
Engine = Literal["transformers", "vllm"]
Policy = Literal["student", "teacher", "mixed", "speculative", "teacher-mixed"]
EngineName = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled."""

    policy: Policy = "student"
    """Who answers: the student (on-policy), the teacher (off-policy), each its share of the prompts (mixed), or both
    token by token: the teacher mends what it would not say (speculative), or has a share in each (teacher-mixed)."""
    student_share: float = 0.5
    """Mixed: the paper's lambda, the share of prompts that the student answers."""
    accept_k: int = 25
    """Speculative: the student's tokens stay where they are among the teacher's best so many."""
    draft: int = 8
    """Speculative, teacher-mixed: tokens the student proposes before the teacher reads them; changes the speed
    alone."""
    teacher_share: float = 0.2
    """Teacher-mixed: the alpha of Gu et al. 2024, the teacher's share of the distribution that tokens are sampled
    from."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_prompt_tokens: int = 512
    """Longer prompts are left out and counted; with 512 new tokens this is Table 10's length of 1024."""
    limit: int | None = None
    """Only the first so many prompts."""
    column: str | None = None
    """Column of the prompts: messages or text. Default: messages, else prompt."""
    config_name: str | None = None
    """A dataset's configuration."""
    split: str | None = None
    """A dataset's split; None: train."""
    system: str | None = None
    """System message of prompts that bring none."""
    engine: EngineName = "auto"
    """"auto" is vLLM where it is installed, else transformers; what both write token by token is transformers'
    alone."""
    batch_size: int = 32
    """Transformers: responses sampled at a time."""
    part_size: int | None = None
    """Responses per part file: what an interruption can cost. None: 256, with vLLM 2,048."""
    dtype: DType = "auto"
    tensor_parallel: int = 1
    """vLLM: GPUs that share one copy of the model."""
    data_parallel: int = 1
    """vLLM: copies of the model, each of which answers parts of its own."""
    memory_fraction: float = 0.9
    """vLLM: share of each GPU's memory (without a GPU: of the machine's) for weights and cache."""
    max_model_len: int | None = None
    """vLLM: longest sequence; None: what the longest prompt and its response need."""
    quantization: str | None = None
    """vLLM: how weights are quantised, such as fp8; None: as they were saved."""


SPEED_ALONE = ("data_parallel", "memory_fraction")
"""What of `GenerateConfig` an artifact does not record."""


@dataclass(frozen=True)
class ScoreConfig:
    """What of both models' views is recorded."""

    signal: Literal["hidden", "hidden8", "topk", "ranks"] = "hidden"
    """hidden: exact for any setting; hidden8: the same in int8; topk: a lower bound of the divergence; ranks: no direct
    term."""
    k: int = TSDKDConfig.k
    """Candidates the student proposes at each position."""
    top_k: int = 64
    """Teacher log-probabilities per token with the signal "topk"."""
    batch_tokens: int = 8192
    """Tokens per forward, padding included."""
    dtype: DType = "auto"
    device_map: Literal["one", "auto"] = "one"
    """auto: each model is spread over all of the machine's GPUs, and what they cannot hold over its memory."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of full fine-tuning (peft's names)."""

    rank: int = 16
    alpha: int = 32
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str = "all-linear"
    """Names of modules, joined by commas; "all-linear" is every linear layer but the output head."""
    merge: bool = False
    """Save full weights instead of an adapter."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA's dropout is {self.dropout}.", "Choose a value in [0, 1).")


@dataclass(frozen=True)
class ReplayConfig:
    """When the student's own responses are learned from, afresh or again: DistiLLM's schedule and its numbers."""

    phi: float = 0.0
    """Probability of the student's own responses at the beginning."""
    phi_rise: float = 0.1
    """Each time the held-out divergence is too high."""
    tolerance: float = 0.1
    """Nats by which it may be above its mark."""
    capacity: int = 1000
    """Responses that are kept to be learned from again."""

    def __post_init__(self) -> None:
        if not (0 <= self.phi <= 1 and 0 <= self.phi_rise <= 1):
            raise InputError(f"phi is {self.phi} and rises by {self.phi_rise}.", "Choose values in [0, 1].")


@dataclass(frozen=True)
class LiveConfig:
    """How responses come to be during training, and who reads them; the paper's setting is lambda = 1."""

    on_policy: float = 1.0
    """The paper's lambda: the share of prompts that the student answers afresh; the others keep recorded responses."""
    sampling: GenerateConfig = field(default_factory=GenerateConfig)
    """How the student answers, alone or teacher-mixed; precision is not its to say here."""
    teacher_dtype: DType = "auto"
    teacher_device: str | None = None
    """None: where the student is; "auto": spread over what there is."""
    replay: ReplayConfig | None = None
    """Decides in place of `on_policy` when the student answers; None: nothing is learned from again."""

    @property
    def teacher_share(self) -> float:
        """Of the distribution that fresh answers are sampled from."""
        return self.sampling.teacher_share if self.sampling.policy == "teacher-mixed" else 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise InputError(f"lambda is {self.on_policy}.", "Choose a share in [0, 1]; 1 is the paper's on-policy.")
        if self.replay and self.on_policy:
            raise InputError("The schedule of replays decides when the student answers.", "Give --lambda 0, or none.")


@dataclass(frozen=True)
class TrainConfig:
    """How the student learns; defaults are Table 10's."""

    method: str = "tsdkd"
    """The objective's name, of `objectives.OBJECTIVES`."""
    objective: TSDKDConfig = field(default_factory=TSDKDConfig)
    live: LiveConfig | None = None
    """None: from recorded scores, the teacher absent."""
    lora: LoRAConfig | None = None
    """None: every weight learns."""
    learning_rate: float = 5e-6
    epochs: float = 3.0
    batch_size: int = 128
    """Responses per optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Responses per forward; does not change the result, but for what `objective.released` takes from a batch."""
    warmup_ratio: float = 0.1
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward; weights and optimizer are float32. "auto" is bf16 where the hardware has it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Fuse the objective's work between its matrix products; costs seconds at the start and needs a compiler."""
    attention: str | None = None
    """Implementation by transformers' name; None: eager on CPUs, else what transformers prefers."""
    held_out: float = 0.0
    """Share of the prompts that is only measured on."""
    eval_steps: int = 0
    """Steps between measurements on them, 0 for none; the best measured step is what is kept in the end."""
    stop_on_collapse: bool = False
    """End a run that degenerates, with the last good saved step."""
    save_steps: int = 100
    """With `eval_steps`, every measurement is also a save, and this does not count."""
    trackers: tuple[str, ...] = ()
    """transformers' integrations that get every log: tensorboard, trackio, wandb."""

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
            ("epochs", self.epochs > 0, "above 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0; a large one switches clipping off"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")
        if bool(self.held_out) != bool(self.eval_steps):
            raise InputError("--held-out and --eval-steps belong together.", "Give both, or neither.")
        find(self.method).require(self.objective)
        self._require_schedule()

    def _require_schedule(self) -> None:
        replay = self.live and self.live.replay
        if find(self.method).replays and not replay:
            raise InputError(f"{self.method} is for live training.", "Give --teacher and --rollouts.")
        if replay and not find(self.method).replays:
            raise InputError(f"{self.method} has no schedule of replays.", "Leave it out, or choose distillm.")
        if replay and not self.eval_steps:
            raise InputError(
                f"The schedule of {self.method} follows the held-out divergence.", "Give --held-out and --eval-steps."
            )
        if replay and replay.capacity < self.batch_size:
            raise InputError(
                f"Of {replay.capacity} kept responses no batch of {self.batch_size} can be made.",
                "Raise --capacity, or lower --batch-size.",
            )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured."""

    tasks: tuple[str, ...] = ("all",)
    """Benchmarks by name; "all" is the paper's ten."""
    limit: int | None = None
    """Documents per benchmark, spread over its subjects."""
    chat_template: bool | None = None
    """None: on when the tokenizer has one."""
    max_new_tokens: int | None = None
    """Cuts answers earlier than the benchmarks do."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: the model's context."""
    engine: Engine = "transformers"
    tensor_parallel: int = 1
    """GPUs that hold one model, with vLLM."""
    memory_fraction: float = 0.9
    """vLLM: share of each GPU's memory (without a GPU: of the machine's) for weights and cache; not recorded."""
    batch_size: int | None = None
    """Requests at a time; None: as many as fit. Without effect on the result, but for the rounding of 16 bits."""
    dtype: DType = "auto"


@dataclass(frozen=True)
class PruneConfig:
    """How many layers go, and how they are chosen."""

    drop: int = 1
    limit: int = 8
    """Prompts the choice is made on."""
    max_tokens: int = 256
    """Tokens of each."""
    column: str | None = None
    dtype: DType = "auto"


RANDOM, LARGEST_GAP, LONGEST_OPENER = "random", "largest-gap", "longest-opener"


@dataclass(frozen=True)
class InspectConfig:
    """Which response is looked at, and by which rules its tokens count; None: as the checkpoint was trained."""

    sample: str = RANDOM
    """An id; or random, largest-gap (mean entropy, student less teacher), longest-opener (tokens)."""
    seed: int = 0
    """Of the random choice."""
    opener: float | Literal["adaptive"] | None = None
    em_ratio: float | None = None
    gate: bool | None = None
    tau: float | None = None
    k: int | None = None

    def objective(self, recorded: TSDKDConfig, most: int | None = None) -> TSDKDConfig:
        """What was `recorded`, with what is given here; no more than `most` candidates. Raises InputError."""
        names = ("opener", "em_ratio", "gate", "tau", "k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if most is not None:
            if given.get("k", 0) > most:
                raise InputError(f"--k is {given['k']}, but only {most} candidates were recorded.", "Lower --k.")
            given.setdefault("k", min(recorded.k, most))
        return replace(recorded, **given)
