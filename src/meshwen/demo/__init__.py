# SPDX-License-Identifier: Apache-2.0
"""The embedded demo checkpoint: a 1/16-scale Qwen2.5-7B that solves templated word problems."""

from pathlib import Path


def path() -> Path:
    """The folder of the demo checkpoint, in the form of a Hugging Face model."""
    return Path(__file__).parent
