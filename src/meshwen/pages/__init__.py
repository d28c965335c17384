# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML files that need nothing else: what they look like, and how they are filled in.

The templates draw the plots, as SVG in the page's own colours, light and dark, and readable on a
phone. Plotting libraries write fixed colours or fetch scripts, and leave placing labels to us.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from meshwen.common.units import bytes_text, difference_text


def render(name: str, *, script: str | None = None, **values: Any) -> str:
    """The page `NAME.html.jinja`; every value is escaped.

    Nothing runs in a browser but the script, and nothing is fetched: the page's content security
    policy allows it by its hash alone.

    Args:
        name: of the page.
        script: the name of its script, of the files here.
        values: what the page shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("meshwen", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": bytes_text, "difference": difference_text}
    text = "" if script is None else _file(script)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    # Its own source: nothing of what `values` holds is in it.
    page = {"script": Markup(text), "script_source": f"'sha256-{digest}'" if text else "'none'"}
    return environment.get_template(f"{name}.html.jinja").render(values | page)


def _file(name: str) -> str:
    return (resources.files("meshwen.pages") / name).read_text(encoding="utf-8")
