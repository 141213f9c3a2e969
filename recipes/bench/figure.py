"""The figure of a bench: differences to GKD with their intervals."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

from recipes.experiment.statistics import half_interval
from recipes.experiment.tables import MEASURES, Row


def draw_differences(rows: Sequence[Row], output: Path) -> None:
    """Draw a panel for each measure, with mean and 95 % interval over seeds for each row except the reference."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "bench"  # the same results give the same bytes
    compared = [row for row in rows if not row.is_reference]
    size = (3.2 * len(MEASURES), 1 + 0.2 * len(compared))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, sharey=True, layout="constrained")
    for axis, (measure, (heading, _, scale, _)) in zip(axes, MEASURES.items(), strict=True):
        axis.axvline(0, color="grey", linewidth=0.8)
        for height, row in enumerate(reversed(compared)):
            if values := [scale * value for value in row.differences(measure)]:
                axis.errorbar(fmean(values), height, xerr=half_interval(values), fmt="o", color="C0", markersize=3)
        axis.set(title=heading, xlabel="difference to GKD")
    axes[0].set_yticks(range(len(compared)), [row.name for row in reversed(compared)], fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)
