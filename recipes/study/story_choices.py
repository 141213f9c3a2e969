"""What models know of the stories: python -m recipes.study.story_choices DIRECTORY/embedded

A row per arm, over the test prompts. "right value likelier": after the beginning of the answer, by the first token that
differs; `tsdkd eval --tasks embedded` measures the same by whole values, on other stories. The other columns are of the
responses at temperature 0, of which a right one names the right value and not the other. All are percentages, means
over seeds with 95 % intervals, beside the differences to GKD at the same learning rate, paired by seed. The first row
is the responses of the teacher to the training prompts, at temperature 1.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from recipes.experiment.arms import seed_directories
from recipes.experiment.conditions import Rows
from recipes.experiment.measures import RESULT, read_responses
from recipes.experiment.settings import Settings
from recipes.experiment.statistics import Runs, format_interval, paired_differences
from recipes.experiment.tables import format_lines
from recipes.experiment.tasks import StoryTask, find_task
from tsdkd.stages.data.embedded import make as stories
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import chat_token_ids

CHOICE_FILE = "right-value-likelier.json"
"""Beside an arm's result, because reading a model takes minutes on a CPU."""
MEASURES = ("right value likelier", "right", "first value is right", "names both values", "names neither")
TEACHER = "teacher-train"
RATE = re.compile(r"-\d[\d.]*(e-\d+)?$")
"""The end of an arm's name."""
BATCH = 64


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and the answer up to where its two values differ, and the next id of each."""

    ids: list[int]
    right: int
    wrong: int


def make_question(tokenizer: PreTrainedTokenizerBase, story: dict[str, Any]) -> Question:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    (wrong,) = set(story["choices"]) - {story["answer"]}
    values = encode(f" {story['answer']}"), encode(f" {wrong}")
    shared = next(i for i, (a, b) in enumerate(zip(*values, strict=False)) if a != b)
    ids = chat_token_ids(tokenizer, stories.messages(story)) + encode(story["beginning"]) + values[0][:shared]
    return Question(ids, values[0][shared], values[1][shared])


@torch.no_grad()
def is_right_likelier(model: LanguageModel, questions: list[Question]) -> Iterator[bool]:
    """For each question, whether the right id is likelier than the wrong one."""
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(question.ids) for question in batch], batch_first=True)
        lengths = torch.tensor([len(question.ids) for question in batch])
        hidden = model.hidden(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        logits = model.head.logits(hidden[torch.arange(len(batch)), lengths - 1])
        for row, question in zip(logits, batch, strict=True):
            yield bool(row[question.right] > row[question.wrong])


def measure_choice(output: Path, model: str, asked: Rows) -> float:
    """The fraction of stories whose right value is likelier. A measurement that exists is kept."""
    file = output / CHOICE_FILE
    if not file.is_file():
        reader = load_model(model)
        questions = [make_question(reader.tokenizer, story) for story in asked]
        file.write_text(json.dumps(fmean(is_right_likelier(reader, questions))))
    return float(json.loads(file.read_text()))


def measure_responses(task: StoryTask, rollouts: Path) -> dict[str, float]:
    """Fractions of the greedy responses, under the names in MEASURES."""
    named = [
        (task.by_prompt[prompt]["answer"], task.named_values(prompt, response))
        for prompt, response in read_responses(rollouts)
    ]
    return {
        "right": fmean(values == [answer] for answer, values in named),
        "first value is right": fmean(values[:1] == [answer] for answer, values in named),
        "names both values": fmean(len(values) == 2 for _, values in named),
        "names neither": fmean(not values for _, values in named),
    }


def measure_arms(directory: Path) -> dict[str, Runs]:
    """The measures of the teacher's responses, and of each complete arm and seed that was finite."""
    with chdir(directory):
        task = find_task(Settings("embedded"))
        assert isinstance(task, StoryTask)
        arms: dict[str, Runs] = {TEACHER: {0: measure_responses(task, Path(TEACHER))}}
        complete = [path.parent for seed in seed_directories(Path()) for path in sorted(seed.glob(f"*/{RESULT}"))]
        for output in track([output for output in complete if (output / "greedy").is_dir()], "reading models"):
            model = output / "checkpoint" if (output / "checkpoint").is_dir() else output.parent / "student"
            choice = measure_choice(output, str(model), task.parts["test"])
            measured = {"right value likelier": choice, **measure_responses(task, output / "greedy")}
            seed = int(output.parent.name.removeprefix("seed-"))
            arms.setdefault(output.name, {})[seed] = measured
    return arms


def format_rows(arms: dict[str, Runs]) -> str:
    """A Markdown table of the arms with their differences to GKD, which has an arm for each learning rate."""
    rows = [["", "seeds", *(heading for measure in MEASURES for heading in (f"{measure} %", "points"))]]
    for name, runs in arms.items():
        rate = RATE.search(name)
        reference = arms.get(f"gkd{rate[0]}", {}) if rate else {}
        cells = []
        for measure in MEASURES:
            values = [100 * run[measure] for run in runs.values() if measure in run]
            cells.append(format_interval(values) if values else "")
            differences = [100 * value for value in paired_differences(runs, reference, measure)]
            cells.append(format_interval(differences) if differences and runs is not reference else "")
        rows.append([name, str(len(runs)), *cells])
    return format_lines(rows)


def main() -> None:
    sys.stdout.write(format_rows(measure_arms(Path(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
