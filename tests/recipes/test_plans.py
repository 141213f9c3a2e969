"""The plans: several right solutions of a problem, free choices at their beginning, and one answer."""

import math
import random
from collections import Counter
from itertools import islice

import pytest

from recipes.experiment.plans import EVERY_PLAN, GROUPS, ONE_PLAN, PLANS, SHORT_PLANS, STARTS, solve
from recipes.experiment.task import END, Task

PROBLEM = "471930582614?"
SOLUTIONS = [solve(PROBLEM, plan) for plan in EVERY_PLAN]


def test_a_solution_follows_its_plan_and_writes_every_sum() -> None:
    head, _, steps = solve("471930582614?", "d4").partition("=")
    assert head == "d4:582614471930"
    assert steps == (
        "00+5=05;05+8=13;13+2=15;15+6=21|21+1=22;22+4=26;26+4=30;30+7=37|37+1=38;38+9=47;47+3=50;50+0=50#50"
    )


@pytest.mark.parametrize(
    ("problem", "digits"),
    [
        ("471930?", ["471930", "719304", "193047", "930471", "304719", "047193"]),
        (
            "471930582614?",
            ["471930582614", "193058261447", "305826144719", "582614471930", "261447193058", "144719305826"],
        ),
    ],
)
def test_the_starts_divide_the_ring(problem: str, digits: list[str]) -> None:
    assert [solve(problem, f"{start}2")[3:].partition("=")[0] for start in STARTS] == digits


@pytest.mark.parametrize(("task", "length"), [(PLANS, 115), (ONE_PLAN, 115), (SHORT_PLANS, 61)], ids=["12", "one", "6"])
def test_every_plan_gives_the_answer_in_the_tasks_number_of_tokens(task: Task, length: int) -> None:
    for problem in islice(task.problems(3), 50):
        texts = [solve(problem, plan) for plan in EVERY_PLAN]
        assert all(task.is_correct(problem, text) for text in texts)
        assert {text[-2:] for text in texts} == {f"{sum(map(int, problem[:-1])) % 100:02}"}
        assert {len(task.tokenizer()(text + END).input_ids) for text in texts} == {length}
        assert length < task.response_tokens <= task.context - len(problem)


@pytest.mark.parametrize("response", [SOLUTIONS[0][:-1] + "9", SOLUTIONS[0][:-3], "50", "", "#50#", "#150"])
def test_other_responses_are_wrong(response: str) -> None:
    assert not PLANS.is_correct(PROBLEM, response)


def test_a_response_is_correct_by_its_answer_alone() -> None:
    assert PLANS.is_correct(PROBLEM, "a2:nonsense#50")


def test_entropy_is_at_the_choices_alone() -> None:
    """The next character, given all before it, over the solutions of one problem."""
    assert len(set(SOLUTIONS)) == len(STARTS) * len(GROUPS)
    entropies = []
    for position in range(len(SOLUTIONS[0])):
        prefixes = Counter(text[:position] for text in SOLUTIONS)
        longer = Counter(text[: position + 1] for text in SOLUTIONS)
        entropies.append(
            sum(n / len(SOLUTIONS) * math.log(prefixes[text[:position]] / n) for text, n in longer.items())
        )
    assert entropies[:2] == pytest.approx([math.log(len(STARTS)), math.log(len(GROUPS))])
    assert entropies[2:] == pytest.approx([0.0] * len(entropies[2:]), abs=1e-12)


def test_solutions_choose_every_plan_equally_often() -> None:
    generator = random.Random(0)
    plans = Counter(PLANS.solution(PROBLEM, generator)[:2] for _ in range(1800))
    assert set(plans) == {text[:2] for text in SOLUTIONS}
    assert min(plans.values()) > 60


def test_problems_have_their_digits_and_splits_share_none() -> None:
    parts = PLANS.split(20, 10, 30)
    assert [len(part) for part in parts] == [20, 10, 30]
    assert len({problem for part in parts for problem in part}) == 60
    assert all(len(problem) == 13 for part in parts for problem in part)


def test_solutions_of_one_plan_have_no_choice() -> None:
    assert {ONE_PLAN.solution(PROBLEM, random.Random(seed))[:2] for seed in range(20)} == {"a3"}
