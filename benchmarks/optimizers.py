"""Memory of each optimizer and of quantised weights, planned beside measured, and the weights that they lead to.

    python benchmarks/optimizers.py

Trains a random model of 2.5 million weights for five steps on a CPU, in one process and in two gloo processes (DDP),
each in a process of its own. Bytes are those of the tensors. Paged optimizers need a GPU. A second table is the plan
for the shape of Qwen2.5 1.5B.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.g_optimizers import state_bytes_of
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.training import Weights, distance
from tsdkd.processes import rank
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.optimizer import OPTIMIZERS
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.memory import TrainingMemory, estimate_training_memory
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline
from tsdkd.stages.train.trainer import DistillationTrainer

STEPS, BATCH = 5, 8
CONFIG = TrainConfig(
    learning_rate=1e-4, epochs=1, batch_size=BATCH, micro_batch_size=2, warmup_ratio=0, precision="float32"
)
LORA = LoRAConfig(rank=16, merge=True)
FULL = {name: replace(CONFIG, optimizer=name) for name in OPTIMIZERS}
ADAPTERS = {
    f"LoRA on {bits or '32bit'}, {name}": replace(CONFIG, optimizer=name, lora=replace(LORA, quantize=bits))
    for bits in (None, "8bit", "4bit")
    for name in ("adamw_torch", "adamw_8bit")
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
QWEN = Qwen2Config(
    vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Bytes:
    """Of the tensors in one process, after training."""

    weights: int
    """With gradients."""
    optimizer: int


def main() -> None:
    table = Table("", "weights, gradients", "planned", "optimizer", "planned", "difference", "two processes")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        student = save_tiny_model(work / "student", seed=1, width=256, layers=4)
        teacher = save_tiny_model(work / "teacher", seed=2, width=256, layers=4)
        prompts = write_prompts(work / "prompts.jsonl", STEPS * BATCH)
        generate(prompts, str(student), work / "rollouts", GenerateConfig(engine="transformers", max_new_tokens=24))
        score(work / "rollouts", str(student), str(teacher), work / "scores", ScoreConfig())
        start, usual = read_weights(student), dict[tuple[bool, str | None], Weights]()
        for name, config in {**FULL, **ADAPTERS}.items():
            if OPTIMIZERS[config.optimizer].paged:
                continue
            one, two = (run(work, name, launcher) for launcher in ([sys.executable], LAUNCH))
            found, measured = read_weights(one), Bytes(**json.loads((work / f"{one.name}.json").read_text()))
            reference = usual.setdefault((bool(config.lora), config.quantize), found)
            path = distance(usual[bool(config.lora), None], start)
            planned = estimate_training_memory(load_config(str(student)), (), 1, config, "float32")
            apart = (distance(found, reference), distance(read_weights(two), found))
            table.add_row(
                name,
                *_megabytes(measured.weights, planned.weights, measured.optimizer, planned.optimizer),
                *(f"{value / path:.1e}" for value in apart),
            )
    console = Console(width=150)
    console.print(table)
    console.print("difference: from the first row with these trained and frozen weights; two processes: from one.")
    console.print("Both are divided by the way of AdamW from the start, full or LoRA on unquantised weights.")
    console.print(plan_table())


def run(work: Path, name: str, launcher: list[str]) -> Path:
    """Train in processes of their own. Returns the checkpoint."""
    output = work / f"{len(launcher)} {name}"
    command = [*launcher, __file__, str(work), name, str(output)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return output


def train(work: Path, name: str, output: Path) -> None:
    whole = DistillationTrainer.train

    def train_and_count(self: DistillationTrainer, *arguments: Any, **more: Any) -> Any:
        result = whole(self, *arguments, **more)
        if rank() == 0:
            Path(f"{output}.json").write_text(json.dumps(asdict(count_bytes(self))))
        return result

    config = {**FULL, **ADAPTERS}[name]
    with replaced_attribute(DistillationTrainer, "train", train_and_count):
        train_offline(work / "rollouts", work / "scores", str(work / "student"), output, config)


def count_bytes(trainer: DistillationTrainer) -> Bytes:
    """Gradients have the bytes of their weights."""
    model: Any = trainer.model
    weights = sum(value.nbytes for value in {value.data_ptr(): value for value in model.state_dict().values()}.values())
    weights += sum(value.nbytes for value in model.parameters() if value.requires_grad)
    return Bytes(weights, state_bytes_of(trainer.optimizer))


def read_weights(path: Path) -> Weights:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def plan_table() -> Table:
    table = Table("Qwen2.5 1.5B, bfloat16 forward", "weights, gradients", "optimizer", "together")
    for name, config in {**FULL, **ADAPTERS}.items():
        planned: TrainingMemory = estimate_training_memory(QWEN, (), 1, config, "bfloat16")
        sizes = (planned.weights, planned.optimizer, planned.weights + planned.optimizer)
        table.add_row(name.replace("on 32bit", "on bfloat16"), *(f"{size / 1e9:.2f} GB" for size in sizes))
    return table


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:.3f} MB" for size in sizes]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        main()
