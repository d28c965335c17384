# SPDX-License-Identifier: Apache-2.0
"""The one exception a user is meant to read."""

import re

# What ends a line or commands a terminal.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class MeshwenError(Exception):
    """Something the user must change: the message says what was wrong, where, and what to do.

    The command line prints it as one line and exits with status 2. Messages name files, keys and
    values of strangers: control characters in them are written as Python writes them.
    """

    def __init__(self, message: str):
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))
