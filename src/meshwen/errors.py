# SPDX-License-Identifier: Apache-2.0
"""The one exception a user is meant to read."""


class MeshwenError(Exception):
    """Something the user must change: the message says what was wrong, where, and what to do.

    The command line prints it as one line and exits with status 2.
    """
