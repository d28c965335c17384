# SPDX-License-Identifier: Apache-2.0
"""A comparison of activations as one HTML file that needs nothing else: a plot and a table."""

from __future__ import annotations

from typing import Any

from meshwen.pages import render
from meshwen.verify.plot import divergence_plot

FROM_TOKENS, FROM_INPUTS = "computed from the tokens", "computed from the file's inputs"


def activations_html(report: dict[str, Any]) -> str:
    """The whole page of an `activation_report`; everything of the report's is escaped."""
    rows = report["activations"]
    plot = divergence_plot(
        [row["operation"] for row in rows],
        {
            FROM_TOKENS: [row["from_tokens"]["relative"] for row in rows],
            FROM_INPUTS: [row["from_inputs"]["relative"] for row in rows],
        },
    )
    return render("activations", r=report, plot=plot)
