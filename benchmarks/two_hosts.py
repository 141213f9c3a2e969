"""The lines of docs/several_machines.md, run as two nodes on this machine: does training resume, and is it that of one?

    python -m benchmarks.two_hosts

Each node has one process on a CPU, connected by the loopback interface, and tiny models. As root on Linux, each node
has a host name of its own, and two cases hide the run directory from the second node. `srun` and `scontrol` are small
programs that stand for SLURM's.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.helpers.commands import run as run_command
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.training import same_update, weights
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "several_machines.md"
LIMIT = 300
"""Seconds in which a run must end."""
EPOCHS = 4
OPTIONS = "--k 4 --precision float32 --learning-rate 1e-3 --batch-size 4 --micro-batch-size 2 --save-steps 2"
CLUSTER = {
    "scontrol": "echo 127.0.0.1",
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done\n'
    "status=0; for pid in $pids; do wait $pid || status=1; done; exit $status",
}
"""Shell programs in place of SLURM's: both nodes are this machine, and srun has one option."""
Nodes = list[subprocess.Popen[str]]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def torchrun_lines(page: str) -> list[str]:
    """The command of each node."""
    return re.findall(r"^torchrun .*?(?=  # on gpu)", blocks(page)[0], flags=re.MULTILINE)


def sbatch_script(page: str) -> str:
    return next(block for block in blocks(page) if block.startswith("#!/bin/bash"))


def on_this_machine(text: str, run: Path, port: int) -> str:
    """The lines with one process per node, a local address, a run directory and the options of tiny models."""
    changes = {"--nproc-per-node 8": "--nproc-per-node 1", "gpu1:29500": f"127.0.0.1:{port}", ":29500": f":{port}"}
    changes |= {"--run runs/a": f"--run {run} --epochs {EPOCHS} {OPTIONS}"}
    for given, used in changes.items():
        text = text.replace(given, used)
    return text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Bench:
    """The runs of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.page = directory, PAGE.read_text()
        self.student = save_tiny_model(directory / "student", seed=0)
        teacher = save_tiny_model(directory / "teacher", seed=1)
        prompts = write_prompts(directory / "prompts.jsonl", 24)
        self.run = directory / "run"
        sampling = GenerateConfig(engine="transformers", max_new_tokens=12)
        generate(prompts, str(self.student), self.run / "rollouts", sampling)
        score(self.run / "rollouts", str(self.student), str(teacher), self.run / "scores", ScoreConfig(k=4))
        self.checkpoint = self.run / "checkpoint"
        self.namespaces = os.geteuid() == 0 and shutil.which("unshare") is not None
        for name, program in CLUSTER.items():
            (directory / name).write_text(f"#!/bin/bash\n{program}\n")
            (directory / name).chmod(0o755)
        paths = os.pathsep.join([str(directory), str(Path(sys.executable).parent), os.environ["PATH"]])
        more = {"PATH": paths, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]"}
        self.environment = os.environ | more | slurm
        run_command("train", "--run", self.run, "--epochs", EPOCHS, *OPTIONS.split())
        self.expected = weights(self.checkpoint)

    def start(self, lines: Sequence[str], before: Sequence[str] = ("", "")) -> Nodes:
        """One shell per node; `before`: what it runs first, as root in namespaces of its own. One line has no node."""
        return [
            subprocess.Popen(
                [*(self.isolated(node) if len(lines) > 1 else []), "bash", "-c", f"{command}{line}"],
                env=self.environment,
                cwd=self.directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for node, (line, command) in enumerate(zip(lines, before, strict=False))
        ]

    def isolated(self, node: int) -> list[str]:
        names = ["unshare", "--uts", "--mount", "bash", "-c", f'hostname gpu{node + 1}; exec "$@"', "-"]
        return names if self.namespaces else []

    def two_nodes(self) -> list[str]:
        port = free_port()
        return [on_this_machine(line, self.run, port) for line in torchrun_lines(self.page)]

    def require_same(self) -> None:
        if not same_update(weights(self.checkpoint), self.expected, weights(self.student)):
            raise SystemExit("the weights differ from those of one process")

    def train(self) -> None:
        finish(self.start(self.two_nodes()))
        self.require_same()

    def interrupt(self, number: int, target: Callable[[Nodes], int], message: str = "") -> None:
        """Send a signal to a process of the nodes after a step was saved, and start both lines again."""
        nodes = self.start(self.two_nodes())
        self.wait_for_step(nodes)
        os.kill(target(nodes), number)
        printed = finish(nodes, succeed=False)
        require(message in printed, printed, nodes)
        printed = finish(self.start(self.two_nodes()))
        require("Resuming after step" in printed, printed, [])
        self.require_same()

    def submit(self) -> None:
        finish(self.start([on_this_machine(sbatch_script(self.page), self.run, free_port())]))
        self.require_same()

    def copy_run(self) -> None:
        copy = self.directory / "copy"
        shutil.copytree(self.run, copy)
        hidden = f"mount -t tmpfs none {self.run}; cp -r {copy}/. {self.run}; "
        printed = finish(self.start(self.two_nodes(), ("", hidden)), succeed=False)
        require("gpu2 cannot read and write" in printed and printed.count("error:") == 1, printed, [])
        require(not self.checkpoint.exists(), "the checkpoint's directory remains", [])

    def hide_run(self) -> None:
        printed = finish(self.start(self.two_nodes(), ("", f"mount -t tmpfs none {self.run}; ")), succeed=False)
        require("On gpu2: " in printed and printed.count("error:") == 1, printed, [])

    def wait_for_step(self, nodes: Nodes) -> None:
        while not [*self.checkpoint.glob("resume/checkpoint-*/tsdkd_state.json")]:
            require(all(node.poll() is None for node in nodes), "a node ended before a step was saved", nodes)
            time.sleep(0.01)


def require(holds: bool, fault: str, nodes: Nodes) -> None:
    if not holds:
        for node in nodes:
            end(node)
        raise SystemExit(f"{fault}\n" + "\n".join(node.communicate()[0] for node in nodes))


def end(node: subprocess.Popen[str]) -> None:
    if node.poll() is None:
        os.killpg(node.pid, signal.SIGKILL)


def finish(nodes: Nodes, *, succeed: bool = True) -> str:
    """Wait for all nodes. Returns what they printed."""
    deadline = time.monotonic() + LIMIT
    printed = []
    for node in nodes:
        try:
            printed.append(node.communicate(timeout=max(1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            require(False, "a node waits for the other", nodes)
    text = "\n".join(printed)
    if succeed != all(node.returncode == 0 for node in nodes):
        raise SystemExit(f"the nodes ended with {[node.returncode for node in nodes]}\n{text}")
    return text


def worker(node: subprocess.Popen[str]) -> int:
    """The process that trains, below the shell and torchrun of a node."""
    below = [node.pid]
    while below:
        process = below.pop()
        if b"\0LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes():
            return process
        below += [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    raise SystemExit("a node has no process that trains")


def launcher(node: subprocess.Popen[str]) -> int:
    """The torchrun of a node."""
    return int(re.findall(r"^PPid:\t(\d+)", Path(f"/proc/{worker(node)}/status").read_text(), flags=re.MULTILINE)[0])


def main() -> None:
    with TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        cases: dict[str, Callable[[], None]] = {
            "two nodes": bench.train,
            "process of node 1 killed, both lines again": lambda: bench.interrupt(
                signal.SIGKILL, lambda nodes: worker(nodes[1])
            ),
            "process of node 0 killed, both lines again": lambda: bench.interrupt(
                signal.SIGKILL, lambda nodes: worker(nodes[0])
            ),
            "torchrun of node 1 gets SIGTERM, both lines again": lambda: bench.interrupt(
                signal.SIGTERM, lambda nodes: launcher(nodes[1]), "the last saved step are kept"
            ),
            "the sbatch script": bench.submit,
        }
        if bench.namespaces:
            cases["a copy of the run on node 1: refused"] = bench.copy_run
            cases["no run on node 1: refused"] = bench.hide_run
        for name, case in cases.items():
            shutil.rmtree(bench.checkpoint, ignore_errors=True)
            start = time.monotonic()
            case()
            print(f"{name:58} ok, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
