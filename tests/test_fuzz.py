# SPDX-License-Identifier: Apache-2.0
"""Altered files, a few in each run: every reader returns or says in one line what is wrong.

`make fuzz` tries many more, and keeps what it finds for `test_what_was_once_misread`.
"""

import pytest
from hypothesis import HealthCheck, given, seed, settings

import fuzzing

TARGETS = fuzzing.targets()
EXAMPLES = 40


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_that_was_not_altered_is_read(name, tmp_path):
    target = TARGETS[name]
    if target.missing:
        pytest.skip(f"{target.needs} is not installed")
    target.read(target.valid(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_an_altered_file_is_read_or_refused_in_one_line(name):
    target = TARGETS[name]
    if target.missing:
        pytest.skip(f"{target.needs} is not installed")

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
    "path", fuzzing.findings(), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_was_once_misread(path):
    target = TARGETS[path.parent.name]
    if target.missing:
        pytest.skip(f"{target.needs} is not installed")
    fuzzing.check(target, path.read_bytes())
