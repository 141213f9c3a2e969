"""HTML pages of one inspected response and of a whole artifact."""

from base64 import b64encode
from hashlib import sha256

from markupsafe import Markup

from tsdkd.stages.inspect.aggregate import Aggregate, Histogram
from tsdkd.stages.inspect.response import ENTROPY_LEVELS, InspectedResponse
from tsdkd.stages.inspect.token_texts import show_whitespace
from tsdkd.stages.pages.charts import Z_95, Chart, Series, bar_chart, line_chart
from tsdkd.stages.pages.page import load_templates, render


def response_page(response: InspectedResponse) -> str:
    """A page with the coloured response; selecting a token shows its scores."""
    script = load_templates().get_template("response.js").render()
    return render(
        "response.html",
        response=response,
        level_ranges=list(zip((0.0, *ENTROPY_LEVELS), (*ENTROPY_LEVELS, None), strict=True)),
        show_whitespace=show_whitespace,
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def aggregate_page(aggregate: Aggregate, name: str) -> str:
    """A page with charts over all responses of the artifact `name`."""
    return render("aggregate.html", name=name, summary=aggregate.summary, charts=_charts(aggregate))


def entropy_chart(aggregate: Aggregate) -> Chart:
    """The mean entropy of both models by position, with 95 % intervals (the paper's Fig. 1)."""
    positions = [float(i + 1) for i in range(len(aggregate.responses_by_position))]
    means = aggregate.mean_entropy_by_position
    half = Z_95 * aggregate.standard_errors_by_position
    curves = zip(("student", "teacher"), means, (means - half).clip(0), means + half, strict=True)
    series = [Series(role, positions, *(line.tolist() for line in lines)) for role, *lines in curves]
    title, description = "Mean entropy by position", "The bands are 95 % intervals of the means."
    return line_chart(title, "position in the response", "nats", series, description)


def _charts(aggregate: Aggregate) -> list[Chart]:
    charts = [entropy_chart(aggregate)]
    if aggregate.objective.alpha:
        lengths, counts = zip(*aggregate.opener_length_bins, strict=True)
        openers = Series("openers", [float(length) for length in lengths], counts)
        charts.append(bar_chart("Opener lengths", "tokens", "openers", [openers]))
    if aggregate.has_gate:
        charts.append(_histogram_chart("Gate weights", "gate", aggregate.gates))
    charts.append(_histogram_chart("Agreement of student and teacher", "Kendall's tau", aggregate.agreement))
    if aggregate.captured_mass.counts.any():
        label = "fraction of the teacher's probability"
        charts.append(_histogram_chart("Captured mass", label, aggregate.captured_mass))
    return charts


def _histogram_chart(title: str, label: str, histogram: Histogram) -> Chart:
    tokens = Series("tokens", histogram.bin_centres, histogram.counts.tolist())
    return bar_chart(title, f"{label} (middle of the bin)", "tokens", [tokens])
