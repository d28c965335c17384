# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML files that need nothing else: what they look like, and how they are filled in."""

from __future__ import annotations

from typing import Any

import jinja2

from meshwen.units import bytes_text, difference_text


def render(name: str, **values: Any) -> str:
    """The page `NAME.html.jinja`; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("meshwen", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": bytes_text, "difference": difference_text}
    return environment.get_template(f"{name}.html.jinja").render(values)
