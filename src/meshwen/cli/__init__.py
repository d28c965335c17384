# SPDX-License-Identifier: Apache-2.0
"""The command line: `meshwen generate`, `chat`, `inspect` and `verify`, one file a command."""

from meshwen.cli.app import main

__all__ = ["main"]
