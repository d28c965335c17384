# SPDX-License-Identifier: Apache-2.0
"""Every example runs in a process of its own, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    if example.stem == "finetune":
        losses = [re.findall(r": (\d+\.\d+)", line) for line in done.stdout.splitlines()]
        on_mesh, on_one = np.array(losses, float).T
        np.testing.assert_allclose(on_mesh, on_one, rtol=1e-3)
        assert (np.diff(on_one) < 0).all()
