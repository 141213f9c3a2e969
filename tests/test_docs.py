"""README and docs: links resolve, every page is found, commands parse, options exist."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from tsdkd.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")), *PAGES]
README_LINES = 100
SHELLS = {"bash", "sh", "shell", "console"}
OPERATORS = {"&&", "||", "|", ";", "&", "(", ")", ">", ">>", "<"}
FOREIGN = {
    "ray": "--head --address",
    "torchrun": "--nproc-per-node --nnodes --node-rank --rdzv-endpoint --shutdown-timeout",
    "accelerate": "--num-machines --machine-rank --num-processes --main-process-ip --main-process-port --use-fsdp"
    " --fsdp-version --fsdp-auto-wrap-policy",
    "SLURM": "--nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --requeue --signal --open-mode"
    " --job-name --kill-on-bad-exit --dependency",
    "vllm": "--host --port --served-model-name --enable-lora --max-lora-rank --lora-modules"
    " --max-logprobs --logprobs-mode --enable-scale-out --enforce-eager --generation-config",
    "sglang": "--model-path --context-length",
    "llama.cpp": "--outfile --outtype",
    "hf": "--repo-type --local-dir",
    "zensical": "--clean --strict",
    "benchmarks": "--profile --markdown --megabytes --out --page --seconds --tiny --work --trials",
    "tsdkd.cli.reference": "--check",
}
"""Options of other programs that the pages name."""

Link = tuple[str, str]


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """Markdown without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def links(page: Path) -> Iterator[Link]:
    """Relative targets of links and images, as (path, anchor)."""
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def shell_blocks(page: Path) -> Iterator[str]:
    """Fenced blocks of a shell, and indented ones."""
    text = page.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if language in SHELLS:
            yield block
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE):
        if re.match(r"(\w+=\S* )*(tsdkd|torchrun|accelerate) ", f"{line} "):
            yield line


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `tsdkd` of every command in the page's blocks."""
    for block in shell_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            yield from line_commands(line)


def line_commands(line: str) -> Iterator[list[str]]:
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # a quote that goes on in the next line: curl's JSON
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in OPERATORS:
            command.append(word)
            continue
        if (arguments := tsdkd_arguments(command)) is not None:
            yield arguments
        command = ["redirected"] if word in {">", ">>", "<"} else []


def tsdkd_arguments(command: list[str]) -> list[str] | None:
    """None for a command of another program."""
    words = list(command)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    if words[:1] in (["torchrun"], ["accelerate"]) and "tsdkd" in words:
        words = words[words.index("tsdkd") :]
    return words[1:] if words[:1] == ["tsdkd"] else None


def subcommands(command: Any) -> dict[str, Any]:
    """By name, with the options of each; empty for a command without any."""
    found = getattr(command, "commands", {})
    return {name: below.load() if hasattr(below, "load") else below for name, below in found.items()}


def parse(arguments: list[str]) -> None:
    """Raises the parser's usage errors, and AssertionError for a name that is no command."""
    command: Any = get_command(app)
    rest = [word for word in arguments if word != "--debug"]
    names = list[str]()
    while known := subcommands(command):
        assert rest, f"tsdkd {shlex.join(names)} names no command"
        if rest[0] in {"--version", "--help"}:
            return
        names.append(rest.pop(0))
        assert names[-1] in known, f"{names[-1]} is no command"
        command = known[names[-1]]
    command.make_context(" ".join(names), rest)


def options(command: Any) -> set[str]:
    """Of a command and all below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options(below) for below in subcommands(command).values()))


@pytest.mark.parametrize("page", TEXTS, ids=id_of)
def test_links_resolve(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_every_page_is_reachable_from_the_index() -> None:
    reached, open_ = set(), [DOCS / "index.md"]
    while open_:
        page = open_.pop()
        if page not in reached:
            reached.add(page)
            open_ += [(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")]
    assert set(PAGES) <= reached


def test_the_readme_links_every_page() -> None:
    linked = {(ROOT / path).resolve() for path, _ in links(ROOT / "README.md")}
    assert set(PAGES) <= linked


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_site_has_every_page() -> None:
    def files(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set[str]().union(*(files(below) for below in (entry.values() if isinstance(entry, dict) else entry)))

    navigation = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert files(navigation) == {str(page.relative_to(DOCS)) for page in PAGES}


@pytest.mark.skipif(not (find_spec("zensical") and find_spec("mkdocstrings")), reason="needs the docs extra")
@pytest.mark.parametrize(("addition", "status"), [("", 0), ("[broken](nowhere.md)", 1), ("::: tsdkd.core.nothing", 1)])
def test_the_site_builds_and_broken_pages_fail(addition: str, status: int, tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "tsdkd").symlink_to(ROOT / "tsdkd")
    with (tmp_path / "docs" / "api.md").open("a") as page:
        page.write(f"\n{addition}\n")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == status, built.stdout + built.stderr
    if not status:
        assert "tsdkd_loss_from_hidden" in (tmp_path / "site" / "api" / "index.html").read_text()


@pytest.mark.parametrize("page", TEXTS, ids=id_of)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        for name in arguments:
            if name.endswith(".yaml"):  # --config reads its file as it is parsed
                Path(name).touch()
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"tsdkd {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize("page", TEXTS, ids=id_of)
def test_options_exist(page: Path) -> None:
    known = options(get_command(app)).union({"--help"}, *(names.split() for names in FOREIGN.values()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text()))
    assert named <= known


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("A=1 tsdkd score --k 3 && tsdkd train  # why", [["score", "--k", "3"], ["train"]]),
        ("torchrun --nproc-per-node 2 -m -- tsdkd train", [["train"]]),
        ("echo 'tsdkd generate' | tsdkd plan -", [["plan", "-"]]),
        ("tsdkd artifact show DIR > file.yaml", [["artifact", "show", "DIR"]]),
        ("git clone tsdkd", []),
    ],
)
def test_commands_are_found_in_lines(line: str, expected: list[list[str]]) -> None:
    assert list(line_commands(line)) == expected


@pytest.mark.parametrize("line", ["score --kk 3", "train --k ten", "learn", "artifact", "eval --engine none"])
def test_wrong_commands_do_not_parse(line: str) -> None:
    with pytest.raises((typer.BadParameter.__bases__[0], AssertionError)):
        parse(line.split())
