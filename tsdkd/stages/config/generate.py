"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass

from tsdkd.stages.config.types import DType, EngineName, Policy

AUTHORS = {
    "student": ("student",),
    "teacher": ("teacher",),
    "mixed": ("student", "teacher"),
    "speculative": ("both",),
    "teacher-mixed": ("mixture",),
}
"""Who writes a response, by policy."""
JOINT_AUTHORS = ("both", "mixture")
"""Authors that are two models, token by token."""


@dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled."""

    policy: Policy = "student"
    """Who answers: the student (on-policy), the teacher (off-policy), each its share of the prompts (mixed), or both
    token by token: the teacher mends what it would not say (speculative), or has a share in each (teacher-mixed)."""
    student_fraction: float = 0.5
    """Mixed: the paper's lambda, the share of prompts that the student answers."""
    accept_k: int = 25
    """Speculative: the student's tokens stay where they are among the teacher's best so many."""
    draft_tokens: int = 8
    """Speculative, teacher-mixed: tokens the student proposes before the teacher reads them; changes the speed
    alone."""
    teacher_fraction: float = 0.2
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


SPEED_ONLY_FIELDS = ("data_parallel", "memory_fraction")
"""What of `GenerateConfig` an artifact does not record."""
