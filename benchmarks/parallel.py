"""Two Ray nodes with two workers each: kills of a worker, a node and the driver, and the rate by number of workers.

`python benchmarks/parallel.py [DIRECTORY]` prints both tables. Tiny models on the CPU; a worker has one thread. Rates
are those of the last two thirds of the parts, when all workers have started: the lowest and the highest of the rounds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from tests.helpers.benchmark_rows import write_rows
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
PROMPTS, PART_SIZE, ROUNDS = 144, 6, 2
NO_YES = ("no", "yes")
STAGES = {"generate": "rollouts", "score": "scores", "eval": "results/m"}


class Bench:
    """A directory with models and inputs, and a cluster of two nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        save_tiny_model(directory / "student", seed=2)
        save_tiny_model(directory / "teacher", seed=1, layers=4, width=48)
        save_tiny_model(directory / "larger", seed=3, layers=8, width=256)
        write_prompts(directory / "prompts.jsonl", PROMPTS)
        (directory / "rows").mkdir()
        write_rows(directory / "rows")
        self.cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        self.second = self.cluster.add_node(**NODE)

    def start(self, stage: str, place: str, workers: int = 0, student: str = "student") -> subprocess.Popen[bytes]:
        """Run a stage in a run directory. `workers`: on the cluster; 0: in one process."""
        at = self.directory
        options: dict[str, list[Any]] = {
            "generate": ["--student", at / student, "--prompts", at / "prompts.jsonl", "--part-size", PART_SIZE],
            "score": ["--teacher", at / "teacher", "--k", 4],
            "eval": ["--model", f"m={at / 'student'}", "--tasks", "gsm8k,sciq", "--data", at / "rows"],
        }
        options["generate"] += ["--max-new-tokens", 60, "--engine", "transformers"]
        options["eval"] += ["--max-new-tokens", 60, "--batch-size", 1]
        parallel = ["--ray", self.cluster.address, "--data-parallel", workers] if workers else []
        command = [sys.executable, "-m", "tsdkd", stage, "--run", at / place, *options[stage], *parallel]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait():
            raise SystemExit(f"{process.args} ended with status {process.returncode}")

    def parts(self, stage: str, place: str) -> list[Path]:
        output = self.directory / place / STAGES[stage]
        manifest = output / "manifest.json"
        listed = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
        return [output / part["file"] for part in listed]

    def kill(self, what: str, process: subprocess.Popen[bytes]) -> None:
        if what == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait()
        elif what == "node":
            self.cluster.remove_node(self.second, allow_graceful=False)
        else:
            children = psutil.Process().children(recursive=True)
            next(child for child in children if "RayProcess" in " ".join(child.cmdline())).kill()

    def contents(self, stage: str, place: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.parts(stage, place)}


def kill_and_compare(bench: Bench, stage: str, what: str) -> str:
    """A row: the parts before the kill, seconds until the artifact is complete, and whether its bytes are equal."""
    place = f"{stage}-{what}"
    if stage == "score":
        shutil.copytree(bench.directory / "one" / "rollouts", bench.directory / place / "rollouts")
    process, start = bench.start(stage, place, workers=4), time.monotonic()
    while len(bench.parts(stage, place)) < (2 if stage == "eval" else 4):  # two make a benchmark
        if process.poll() is not None:
            raise SystemExit(f"{stage} ended before it could be killed")
        time.sleep(0.01)
    before = {file: file.stat().st_mtime_ns for file in bench.parts(stage, place)}
    bench.kill(what, process)
    bench.finish(bench.start(stage, place, workers=4) if what == "driver" else process)
    seconds = time.monotonic() - start
    if what == "node":
        bench.second = bench.cluster.add_node(**NODE)
    kept = all(file.stat().st_mtime_ns == changed for file, changed in before.items())
    equal = bench.contents(stage, place) == bench.contents(stage, "one")
    return f"| {stage} | {what} | {len(before)} | {NO_YES[kept]} | {seconds:.0f} s | {NO_YES[equal]} |"


def rate(bench: Bench, stage: str, place: str, workers: int) -> float:
    """Parts a minute."""
    bench.finish(bench.start(stage, place, workers, student="larger"))
    times = sorted(file.stat().st_mtime for file in bench.parts(stage, place))
    times = times[len(times) // 3 :]
    return 60 * (len(times) - 1) / (times[-1] - times[0])


def print_rates(bench: Bench) -> None:
    """Rounds measure all numbers of workers, so that other work on the machine meets all of them."""
    rates = defaultdict[tuple[int, str], list[float]](list)
    for i in range(ROUNDS):
        for workers in (0, 1, 2, 4):
            for stage in ("generate", "score"):
                rates[workers, stage].append(rate(bench, stage, f"rate-{i}-{workers}", workers))
    print("\n| workers | parts of rollouts a minute | parts of scores a minute |\n|---|---|---|")
    for workers in (0, 1, 2, 4):
        ranges = (
            f"{min(rates[workers, stage]):.0f} to {max(rates[workers, stage]):.0f}" for stage in ("generate", "score")
        )
        print(f"| {workers or 'this process'} | {' | '.join(ranges)} |")


def main(directory: Path) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray's 15 would measure what else the machine does
    bench = Bench(directory)
    try:
        for stage in STAGES:
            bench.finish(bench.start(stage, "one"))
        print("| stage | killed | parts before | kept | complete after | bytes of one process |")
        print("|---|---|---|---|---|---|")
        for stage in STAGES:
            for what in ("worker", "node", "driver"):
                print(kill_and_compare(bench, stage, what), flush=True)
        print_rates(bench)
    finally:
        bench.cluster.shutdown()


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
