"""Chains of arithmetic modulo ten, solved step by step.

A solution of `7+8-3-9+4?` is `7+8=5;5m3=2;2-9=3;3p4=7#7`: a step writes each sign as it is or as a letter (p, m), so
one problem has many solutions. A response is correct if the digit after `#` is right.
"""

import random
import re

from recipes.experiment.task import Shape, Task

OPERANDS = 6
WORDS = {"+": "+p", "-": "-m"}


def draw_problem(generator: random.Random) -> str:
    signs = [generator.choice("+-") for _ in range(OPERANDS - 1)]
    return str(generator.randint(1, 9)) + "".join(f"{sign}{generator.randint(1, 9)}" for sign in signs) + "?"


def solution(problem: str, generator: random.Random) -> str:
    value, steps = int(problem[0]), []
    for sign, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        result = (value + int(sign + digit)) % 10
        steps.append(f"{value}{generator.choice(WORDS[sign])}{digit}={result}")
        value = result
    return ";".join(steps) + f"#{value}"


def answer(problem: str) -> str:
    return str(sum(map(int, re.findall(r"[+-]?\d", problem))) % 10)


SUMS = Task(
    name="sums",
    letters="0123456789+-pm=;#?",
    response_tokens=48,  # one and a half times the length of a solution
    context=64,
    draw_problem=draw_problem,
    solution=solution,
    answer=answer,
    teacher=Shape(width=96, inner=256, layers=3, rate=2e-3, steps=1000),
    student=Shape(width=48, inner=144, layers=2, rate=1.5e-3, steps=2000),
)
