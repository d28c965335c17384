# SPDX-License-Identifier: Apache-2.0
"""`python -m meshwen` is the `meshwen` command."""

import sys

from meshwen.cli import main

if __name__ == "__main__":
    sys.exit(main())
