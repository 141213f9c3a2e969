"""The study: its questions, and the arms that each compares. An arm is one set of options of `tsdkd train`."""

import re
from dataclasses import dataclass, replace
from typing import Literal

RATE = 1e-4
GKD, TSDKD = "--method gkd --beta 0.9", "--k 5"
MILD = f"{TSDKD} --direct-weight 10 --em-weight 0.01"
"""Mild weights: more of the direct term, less of the entropy term."""


@dataclass(frozen=True)
class Arm:
    """One training setting."""

    name: str
    options: str
    start: int = 50
    """The accuracy of the student before training, in percent."""
    data: Literal["student", "half", "replayed", "teacher"] = "student"
    """Author of the responses: the student (online), the teacher (recorded), half of each, or both with replay."""
    rate: float = RATE

    @property
    def slug(self) -> str:
        """A directory name that is unique to the arm."""
        words = f"{self.options} start {self.start} {self.data} rate {self.rate:g}"
        return re.sub(r"[^a-z0-9.,]+", "-", words.lower()).strip("-")


@dataclass(frozen=True)
class Question:
    title: str
    groups: list[list[Arm]]
    """Arms that are compared; the first arm of a group is the reference of the others."""


def method_arms(name: str, **conditions: object) -> list[Arm]:
    """GKD, TSD-KD with the paper's weights, and TSD-KD with mild weights, under the same conditions."""
    kinds = {"GKD": GKD, "TSD-KD": TSDKD, "TSD-KD, mild": MILD}
    return [replace(Arm(f"{name}: {kind}", options), **conditions) for kind, options in kinds.items()]


REFERENCE = Arm("direct (GKD, β 0.9)", GKD)
MAIN = [
    REFERENCE,
    Arm("gate", f"{TSDKD} --alpha 0 --em-weight 0"),
    Arm("gate, indirect", f"{TSDKD} --em-weight 0"),
    Arm("gate, entropy", f"{TSDKD} --alpha 0"),
    Arm("gate, indirect, entropy (TSD-KD)", TSDKD),
]
RATES = Question("Which learning rate?", [method_arms(f"{rate:g}", rate=rate) for rate in (RATE / 4, RATE, RATE * 4)])
QUESTIONS = [
    Question("What does each term do?", [MAIN]),
    Question(
        "Which weights (direct : indirect : entropy)?",
        [
            [
                REFERENCE,
                Arm("1 : 0.1 : 1 (the paper's)", TSDKD),
                Arm("1 : 0.1 : 0.1", f"{TSDKD} --em-weight 0.1"),
                Arm("1 : 0.1 : 0.01", f"{TSDKD} --em-weight 0.01"),
                Arm("10 : 0.1 : 0.01 (mild)", MILD),
                Arm("100 : 0.1 : 0.01", f"{TSDKD} --direct-weight 100 --em-weight 0.01"),
                Arm("1 : 0 : 0.01", f"{TSDKD} --alpha 0 --em-weight 0.01"),
                Arm("10 : 0.1 : 0.01, adaptive opener", f"{MILD} --opener adaptive"),
                Arm("1 : 0.1 : 0, two candidates", "--k 2 --em-weight 0"),
                Arm("10 : 0.1 : 0.01, two candidates", "--k 2 --direct-weight 10 --em-weight 0.01"),
            ]
        ],
    ),
    RATES,
    Question("From which student?", [method_arms(f"{start} %", start=start) for start in (25, 50, 85)]),
    Question(
        "Which author of the responses?", [method_arms(data, data=data) for data in ("student", "half", "teacher")]
    ),
    Question(
        "Beside other methods?",
        [
            [
                REFERENCE,
                Arm("GKD, β 0.5", "--method gkd --beta 0.5"),
                Arm("reverse KL", "--method reverse-kl"),
                Arm("skew KL", "--method skew-kl"),
                Arm("SeqKD", "--method seqkd", data="teacher"),
                Arm("supervised KD", "--method supervised-kd", data="teacher"),
                Arm("DistiLLM", "--method distillm --held-out 0.05 --eval-steps 20", data="replayed"),
                Arm("MiniLLM", "--method minillm"),
                Arm("TSD-KD", TSDKD),
                Arm("TSD-KD, adaptive opener", f"{TSDKD} --opener adaptive"),
            ]
        ],
    ),
    Question(
        "What does the released variant do?",
        [
            [
                REFERENCE,
                Arm("TSD-KD", TSDKD),
                Arm("released", "--method tsdkd-released --k 5"),
                Arm("released ranking only", f"{TSDKD} --released ranking"),
                Arm("released opener only", f"{TSDKD} --released opener"),
                Arm("released entropy only", f"{TSDKD} --released entropy"),
            ]
        ],
    ),
]


def every_arm() -> list[Arm]:
    """Every arm once, in the order of the questions."""
    arms = [arm for question in QUESTIONS for group in question.groups for arm in group]
    return list({arm.slug: arm for arm in arms}.values())
