"""Digits, added modulo 100 in an order that the solution chooses first.

A solution of `471930582614?` is `a3:011234456789=` and then `00+0=00;00+1=01;01+1=02|02+2=04;` to `41+9=50#50`. Its
first character is the order, one of `ORDERS`, and its second the size of the groups that `|` ends, one of `GROUPS`.
These two choices are free and equally likely, and they decide every later character. A response is correct if the
number after `#` is right; it is the same for every plan.
"""

import random
from collections.abc import Callable, Sequence

from recipes.experiment.task import Shape, Task

ORDERS: dict[str, Callable[[str], str]] = {
    "g": lambda digits: digits,
    "r": lambda digits: digits[::-1],
    "a": lambda digits: "".join(sorted(digits)),
    "d": lambda digits: "".join(sorted(digits, reverse=True)),
    "e": lambda digits: "".join(sorted(digits, key=lambda digit: int(digit) % 2)),
    "o": lambda digits: "".join(sorted(digits, key=lambda digit: -(int(digit) % 2))),
}
"""As given, reversed, ascending, descending, even digits first, odd digits first; sorting is stable."""
GROUPS = "234"


def solve(problem: str, order: str, group: str) -> str:
    """The solution by one plan."""
    digits = ORDERS[order](problem[:-1])
    value, text = 0, f"{order}{group}:{digits}="
    for number, digit in enumerate(digits, 1):
        result = (value + int(digit)) % 100
        end = "#" if number == len(digits) else "|" if number % int(group) == 0 else ";"
        text += f"{value:02}+{digit}={result:02}{end}"
        value = result
    return f"{text}{value:02}"


def answer(problem: str) -> str:
    return f"{sum(map(int, problem[:-1])) % 100:02}"


def plans(name: str, digits: int, orders: Sequence[str], groups: Sequence[str]) -> Task:
    """The task with this number of digits, whose solutions choose among these orders and groups."""
    length = 9 * digits + 6

    def draw_problem(generator: random.Random) -> str:
        return "".join(generator.choices("0123456789", k=digits)) + "?"

    def solution(problem: str, generator: random.Random) -> str:
        return solve(problem, generator.choice(orders), generator.choice(groups))

    return Task(
        name=name,
        letters="".join(["0123456789+=:;|#?", *ORDERS]),
        response_tokens=round(1.4 * length),
        context=round(1.4 * length) + digits + 8,
        draw_problem=draw_problem,
        solution=solution,
        answer=answer,
        teacher=Shape(width=128, inner=384, layers=4, rate=1e-3, steps=6000, every=100),
        student=Shape(width=64, inner=192, layers=3, rate=1e-3, steps=8000, every=50),
    )


PLANS = plans("plans", 12, [*ORDERS], GROUPS)
SHORT_PLANS = plans("plans-short", 6, [*ORDERS], GROUPS)
"""60 tokens instead of 114."""
ONE_PLAN = plans("plans-one", 12, ["a"], ["3"])
"""Without a free choice, so that a good teacher is certain everywhere."""
