"""Fills a template: one file that opens offline, with styles and charts inside."""

from functools import cache
from typing import Any

import jinja2


@cache
def templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tsdkd.stages.pages"),
        autoescape=True,  # a response may hold any text, markup too
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A page from `templates/`; strings are escaped, `markupsafe.Markup` is not."""
    return templates().get_template(template).render(**values)
