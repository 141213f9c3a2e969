"""The extractor returns the program of a response, with any text around it."""

import pytest

from tsdkd.stages.eval.scorers import extract_code, extract_code_blocks

PROGRAM = "import math\n\ndef area(r):\n    return math.pi * r ** 2"
IMPORTS, FUNCTION = PROGRAM.split("\n\n")
TESTS = ["assert abs(area(1) - math.pi) < 1e-9", "assert set([area(0)]) == {0}"]


def indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line else line for line in text.split("\n"))


SHAPES = {
    "continues the block": f"{PROGRAM}\n```",
    "is cut at the fence": PROGRAM,
    "closes the block without a line break": f"{PROGRAM}```",
    "explains afterwards": f"{PROGRAM}\n```\n\nIt squares `r`, then multiplies by pi.",
    "reopens the block": f"```python\n{PROGRAM}\n```",
    "reopens the block without a language": f"```\n{PROGRAM}\n```",
    "reopens the block after blank lines": f"\n\n```python\n\n{PROGRAM}\n\n```\n",
    "reopens the block on the line of the code": f"```python import math\n\n{FUNCTION}\n```",
    "introduces a block": f"Here is the code:\n\n```python\n{PROGRAM}\n```",
    "introduces a block without a language": f"Here is the code:\n```\n{PROGRAM}\n```\nIt works.",
    "introduces a block that never ends": f"Sure!\n```Python3\n{PROGRAM}",
    "introduces code without a block": f"Here is the function:\n\n{PROGRAM}\n\nIt works.",
    "thinks first": f"<think>\nWe need area(r).\n</think>\n```python\n{PROGRAM}\n```",
    "restates the prompt": f"You are to write area.\nassert area(1)\n```python\n{PROGRAM}\n```",
    "has tildes": f"~~~python\n{PROGRAM}\n~~~",
    "has attributes": f"```{{.python}}\n{PROGRAM}\n```",
    "has four backticks": f"````python\n{PROGRAM}\n````",
    "has HTML": f"<pre><code>\n{PROGRAM}\n</code></pre>",
    "has markers of base models": f"[BEGIN]\n{PROGRAM}\n[DONE]\nNext task",
    "has carriage returns": f"```python\n{PROGRAM}\n```".replace("\n", "\r\n"),
    "is an item of a list": f"1. Code:\n   ```python\n{indented(PROGRAM, 3)}\n   ```",
    "starts with a space": f" {PROGRAM}",
    "is indented": indented(PROGRAM, 4),
    "shows a use": f"{PROGRAM}\n```\nUse:\n```python\nprint(area(2), undefined)\n```",
    "shows a use first": f"```python\nprint(area(2))\n```\nwith\n```python\n{PROGRAM}\n```",
    "shows a formula first": f"```\na = pi * r * r\n```\n```python\n{PROGRAM}\n```",
    "installs first": f"```bash\npip install numpy\n```\n```python\n{PROGRAM}\n```",
    "tests first": f"```python\ndef test():\n    assert area(1)\n```\n```python\n{PROGRAM}\n```",
    "is truncated in a use": f"{PROGRAM}\n\nprint(area(",
    "has two blocks": f"First:\n```python\n{IMPORTS}\n```\nThen:\n```python\n{FUNCTION}\n```",
    "has a helper": "```python\nimport math\ndef square(r):\n    return r * r\n```\n"
    "```python\ndef area(r):\n    return math.pi * square(r)\n```",
    "assigns a lambda": f"```python\n{IMPORTS}\narea = lambda r: math.pi * r ** 2\n```",
    "has a fence in a string": "import math\ndef area(r):\n    '''Area.\n\n    ```\n    area(1)\n    ```\n    '''\n"
    "    return math.pi * r ** 2\n```\nDone.",
    "corrects itself": f"{PROGRAM}\n```\nOr, wrongly:\n```python\ndef area(r):\n    return 0\n```",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_program_is_extracted_from_a_response_that(shape: str) -> None:
    ((program,),) = extract_code_blocks([[SHAPES[shape]]], [{"test_list": TESTS}])
    exec("\n".join([program, *TESTS]), {})  # the test's own programs


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", ""),
        ("I cannot do that.", "I cannot do that."),
        ("def area(r):\n    return r *", "def area(r):\n    return r *"),
        ("def area(r):\n    return 0\n```\nBetter:\n```python\n" + PROGRAM, "def area(r):\n    return 0"),
        ("(" * 10_000, "(" * 10_000),
        ("x = '\0'", "x = '\0'"),
    ],
)
def test_a_response_without_a_right_program_stays_wrong(response: str, expected: str) -> None:
    """The first program counts; nothing is completed."""
    assert extract_code(response, TESTS) == expected
