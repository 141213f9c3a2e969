"""Renders templates into HTML files that open offline, with styles and charts inside."""

from functools import cache
from typing import Any

import jinja2

from tsdkd.printable import escape_controls


@cache
def load_templates() -> jinja2.Environment:
    """The templates of `templates/`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tsdkd.stages.pages"),
        autoescape=True,  # a response may contain markup
        finalize=lambda value: escape_controls(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of `templates/`; strings are escaped, `markupsafe.Markup` is not."""
    return load_templates().get_template(template).render(**values)
