"""Digits in a ring, added modulo 100 from a start that the solution chooses first.

A solution of `471930582614?` is `c3:305826144719=` and then `00+3=03;03+0=03;03+5=08|08+8=16;` to `41+9=50#50`. Its
first character is the start, one of `STARTS`: `a` is the first digit of the ring, and the others divide it evenly. Its
second is the size of the groups that `|` ends, one of `GROUPS`. These two choices are free and equally likely, and they
decide every later character. A response is correct if the number after `#` is right; it is the same for every plan.
"""

import random
from collections.abc import Sequence

from recipes.experiment.task import Shape, Task

STARTS, GROUPS = "abcdef", "234"
EVERY_PLAN = [start + group for start in STARTS for group in GROUPS]


def solve(problem: str, plan: str) -> str:
    """The solution by one plan: a start and the size of the groups."""
    start, group = plan
    ring = problem[:-1]
    first = STARTS.index(start) * len(ring) // len(STARTS)
    digits = ring[first:] + ring[:first]
    value, text = 0, f"{plan}:{digits}="
    for number, digit in enumerate(digits, 1):
        result = (value + int(digit)) % 100
        end = "#" if number == len(digits) else "|" if number % int(group) == 0 else ";"
        text += f"{value:02}+{digit}={result:02}{end}"
        value = result
    return f"{text}{value:02}"


def answer(problem: str) -> str:
    return f"{sum(map(int, problem[:-1])) % 100:02}"


def plans(name: str, digits: int, chosen: Sequence[str]) -> Task:
    """The task with this number of digits, whose solutions follow one of these plans."""
    length = 9 * digits + 6

    def draw_problem(generator: random.Random) -> str:
        return "".join(generator.choices("0123456789", k=digits)) + "?"

    def solution(problem: str, generator: random.Random) -> str:
        return solve(problem, generator.choice(chosen))

    return Task(
        name=name,
        letters=f"0123456789+=:;|#?{STARTS}",
        response_tokens=round(1.4 * length),
        context=round(1.4 * length) + digits + 8,
        draw_problem=draw_problem,
        solution=solution,
        answer=answer,
        teacher=Shape(width=128, inner=384, layers=4, rate=2e-3, steps=3000, every=50),
        student=Shape(width=64, inner=192, layers=3, rate=2e-3, steps=3000),
        beginnings=chosen,
    )


PLANS = plans("plans", 12, EVERY_PLAN)
SHORT_PLANS = plans("plans-short", 6, EVERY_PLAN)
"""61 tokens instead of 115."""
ONE_PLAN = plans("plans-one", 12, ["a3"])
"""Without a free choice, so that a good teacher is certain everywhere."""
