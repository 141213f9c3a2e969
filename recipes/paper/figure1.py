"""Draws the mean entropy of both models by position: python -m recipes.paper.figure1 OUTPUT SCORES"""

import sys
from pathlib import Path

from tsdkd.artifacts.disk import replace_text
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.inspect.page import entropy_chart
from tsdkd.stages.inspect.stage import inspect_all


def main() -> None:
    output, scores = map(Path, sys.argv[1:])
    replace_text(output, entropy_chart(inspect_all(scores, InspectConfig())).svg_file)


if __name__ == "__main__":
    main()
