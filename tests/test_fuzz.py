# SPDX-License-Identifier: Apache-2.0
"""Altered files, a few in each run: every reader returns or says in one line what is wrong.

`make fuzz` tries many more, and keeps what it finds for `test_what_was_once_misread`.
"""

import pytest
from hypothesis import HealthCheck, given, seed, settings

import fuzzing

TARGETS = fuzzing.targets()
EXAMPLES = 40


def marks(name):
    """Readers that need torch are tried where torch is: by `make test-torch`."""
    target = TARGETS[name]
    absent = pytest.mark.skipif(target.missing, reason=f"needs the extra {target.needs}")
    return [absent, pytest.mark.torch] if target.needs == "torch" else [absent]


EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in TARGETS])


@EACH
def test_a_file_that_was_not_altered_is_read(name, tmp_path):
    target = TARGETS[name]
    target.read(target.valid(), tmp_path)


@EACH
def test_an_altered_file_is_read_or_refused_in_one_line(name):
    target = TARGETS[name]

    @seed(0)
    @settings(
        max_examples=max(5, EXAMPLES // target.cost),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.altered)
    def run(data):
        fuzzing.check(target, data)

    run()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=marks(path.parent.name), id=f"{path.parent.name}/{path.name}")
        for path in fuzzing.findings()
    ],
)
def test_what_was_once_misread(path):
    fuzzing.check(TARGETS[path.parent.name], path.read_bytes())
