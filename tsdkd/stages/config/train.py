"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass, field
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.methods import find_method


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
    phi_step: float = 0.1
    """Each time the held-out divergence is too high."""
    replay_tolerance: float = 0.1
    """Nats by which it may exceed its reference."""
    replay_capacity: int = 1000
    """Responses that are kept to be learned from again."""

    def __post_init__(self) -> None:
        if not (0 <= self.phi <= 1 and 0 <= self.phi_step <= 1):
            raise InputError(f"phi is {self.phi} and rises by {self.phi_step}.", "Choose values in [0, 1].")


@dataclass(frozen=True)
class OnlineConfig:
    """How responses come to be during training, and who reads them; the paper's setting is lambda = 1."""

    student_fraction: float = 1.0
    """The paper's lambda: the share of prompts that the student answers afresh; the others keep recorded responses."""
    sampling: GenerateConfig = field(default_factory=GenerateConfig)
    """How the student answers, alone or teacher-mixed; precision is not its to say here."""
    teacher_dtype: DType = "auto"
    teacher_device: str | None = None
    """None: where the student is; "auto": spread over what there is."""
    replay: ReplayConfig | None = None
    """Decides in place of `student_fraction` when the student answers; None: nothing is learned from again."""

    @property
    def teacher_fraction(self) -> float:
        """Of the distribution that fresh answers are sampled from."""
        return self.sampling.teacher_fraction if self.sampling.policy == "teacher-mixed" else 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.student_fraction <= 1:
            raise InputError(
                f"lambda is {self.student_fraction}.", "Choose a share in [0, 1]; 1 is the paper's on-policy."
            )
        if self.replay and self.student_fraction:
            raise InputError("The schedule of replays decides when the student answers.", "Give --lambda 0, or none.")


@dataclass(frozen=True)
class TrainConfig:
    """How the student learns; defaults are Table 10's."""

    method: str = "tsdkd"
    """The objective's name, of `objectives.OBJECTIVES`."""
    objective: TSDKDConfig = field(default_factory=TSDKDConfig)
    online: OnlineConfig | None = None
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
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
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
        find_method(self.method).require_objective(self.objective)
        self._require_schedule()

    def _require_schedule(self) -> None:
        replay = self.online and self.online.replay
        if find_method(self.method).uses_replay and not replay:
            raise InputError(f"{self.method} is for live training.", "Give --teacher and --rollouts.")
        if replay and not find_method(self.method).uses_replay:
            raise InputError(f"{self.method} has no schedule of replays.", "Leave it out, or choose distillm.")
        if replay and not self.eval_steps:
            raise InputError(
                f"The schedule of {self.method} follows the held-out divergence.", "Give --held-out and --eval-steps."
            )
        if replay and replay.replay_capacity < self.batch_size:
            raise InputError(
                f"Of {replay.replay_capacity} kept responses no batch of {self.batch_size} can be made.",
                "Raise --replay-capacity, or lower --batch-size.",
            )
