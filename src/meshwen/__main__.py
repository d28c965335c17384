# SPDX-License-Identifier: Apache-2.0
"""`python -m meshwen` is the `meshwen` command."""

from meshwen.cli import run

if __name__ == "__main__":
    run()
