# SPDX-License-Identifier: Apache-2.0
"""Every example runs in a process of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example, request):
    optimised = request.config.getoption("optimised")
    done = subprocess.run(
        [sys.executable, example],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimised))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if example.stem == "meshes":
        assert done.stdout.count("same tokens: True") == 5
