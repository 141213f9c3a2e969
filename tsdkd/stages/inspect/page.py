"""What was found as one HTML file: the same numbers as in the terminal, everything a rollout says escaped."""

from base64 import b64encode
from hashlib import sha256

from markupsafe import Markup

from tsdkd.stages.inspect.aggregate import Aggregate, Distribution
from tsdkd.stages.inspect.response import LEVELS, Response
from tsdkd.stages.inspect.token_texts import show_whitespace
from tsdkd.stages.pages.charts import Chart, Series, bars, lines
from tsdkd.stages.pages.page import render, templates


def response_page(response: Response) -> str:
    """Its tokens in colours; a click, a tap or the keyboard opens what both models see at one."""
    script = templates().get_template("response.js").render()
    return render(
        "response.html",
        response=response,
        levels=list(zip((0.0, *LEVELS), (*LEVELS, None), strict=True)),
        visible=show_whitespace,
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def aggregate_page(found: Aggregate, name: str) -> str:
    """Charts of all responses of the artifact `name`, each with its values."""
    return render("aggregate.html", name=name, facts=found.facts, charts=_charts(found))


def _charts(found: Aggregate) -> list[Chart]:
    positions = [float(i + 1) for i in range(len(found.reached))]
    curves = zip(("student", "teacher"), found.by_position, strict=True)
    entropy = [Series(who, positions, values.tolist()) for who, values in curves]
    lengths = found.lengths
    openers = Series("openers", [float(first) for first, _ in lengths], [count for _, count in lengths])
    return [
        lines("Mean entropy by position", "position in the response", "nats", entropy),
        *([bars("Opener lengths", "tokens", "openers", [openers])] if found.objective.alpha else []),
        *([_histogram("Gate weights", "gate", found.gates)] if found.gated else []),
        _histogram("Agreement of both rankings", "Kendall's tau", found.agreement),
        *([_histogram("Captured mass", "share of the teacher's mass", found.mass)] if found.mass.counts.any() else []),
    ]


def _histogram(title: str, what: str, one: Distribution) -> Chart:
    return bars(title, f"{what} (middle of the bin)", "tokens", [Series("tokens", one.centres, one.counts.tolist())])
