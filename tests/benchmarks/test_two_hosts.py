"""The page's lines are those that the benchmark of two hosts runs, and their programs accept them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.two_hosts import CLUSTER, PAGE, blocks, on_this_machine, sbatch_script, torchrun_lines


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def torchrun_words(command: str) -> list[str]:
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    return words[words.index("torchrun") + 1 :]


def test_torchrun_accepts_the_lines(page: str) -> None:
    from torch.distributed.run import parse_args

    lines = torchrun_lines(page)
    parsed = [parse_args(torchrun_words(line)) for line in lines]
    assert [line.node_rank for line in parsed] == [0, 1]
    assert lines[0].replace("--node-rank 0", "--node-rank 1") == lines[1]
    command = re.findall(r"'(torchrun .*?)'", sbatch_script(page), flags=re.DOTALL)[0]
    parsed.append(parse_args(torchrun_words(command.replace("$SLURM_NNODES", "2").replace("$SLURM_NODEID", "1"))))
    for arguments in parsed:
        assert arguments.module
        assert [arguments.training_script, *arguments.training_script_args] == ["tsdkd", "train", "--run", "runs/a"]


def test_accelerate_accepts_its_line(page: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    words = shlex.split(next(block for block in blocks(page) if block.startswith("accelerate")).replace("\\\n", " "))
    parsed = launch_command_parser().parse_args(words[2:])
    assert (parsed.num_machines, parsed.machine_rank, parsed.num_processes, parsed.use_fsdp) == (2, 0, 16, True)
    assert parsed.training_script == "tsdkd"
    assert parsed.fsdp_version == "2"


def test_the_shell_accepts_the_script_and_the_programs_that_stand_for_slurm(page: str, tmp_path: Path) -> None:
    for text in (sbatch_script(page), *CLUSTER.values()):
        subprocess.run(["bash", "-n", "-c", text], check=True)
    options = re.findall(r"^#SBATCH (--[\w-]+)(?: \S+)?$", sbatch_script(page), flags=re.MULTILINE)
    assert len(options) == sbatch_script(page).count("#SBATCH")


def test_only_addresses_sizes_and_the_run_are_changed_before_a_line_is_run(page: str) -> None:
    for text in (*torchrun_lines(page), sbatch_script(page)):
        changed = on_this_machine(text, Path("run"), 1234)
        assert "--nproc-per-node 1 " in changed
        assert ":1234" in changed
        assert "--run run --epochs" in changed
        assert not re.search(r"gpu\d|29500|runs/a", changed)
