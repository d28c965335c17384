# SPDX-License-Identifier: Apache-2.0
"""The server's page: its files, what they may do in a browser, and what it is told of the engine.

What a browser makes of it is in `test_server_page_browser.py`.
"""

import asyncio
import re
from dataclasses import replace

import httpx
import pytest

from meshwen.engine.cache_stats import CacheStats
from meshwen.parallel.heads import head_layout
from meshwen.server.layout import Layout
from serving import serving

# Of the 7B on 8 devices, worked out by hand: 4 key/value heads in 2 pieces of 4 query heads each;
# the 7 heads of a group leave the last place of each second piece empty.
QUERY_HEADS = [
    [[0, 1, 2, 3]],
    [[4, 5, 6, None]],
    [[7, 8, 9, 10]],
    [[11, 12, 13, None]],
    [[14, 15, 16, 17]],
    [[18, 19, 20, None]],
    [[21, 22, 23, 24]],
    [[25, 26, 27, None]],
]


def get(path, **changes) -> httpx.Response:
    async def ask():
        async with serving() as server:
            server.app.state.serving = replace(server.serving, **changes)
            return await server.client.get(path)

    return asyncio.run(ask())


def test_the_page_and_all_that_it_names_are_served():
    page = get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(named) == ["page/icon.svg", "page/page.css", "page/page.js"]
    seen, left = set(), [f"/{name}" for name in named]
    while left:
        path = left.pop()
        if path not in seen:
            seen.add(path)
            found = get(path)
            assert found.status_code == 200, path
            left += [f"/page/{name}" for name in re.findall(r'from "\./(\w+\.js)"', found.text)]
    assert "/page/markdown.js" in seen
    kinds = {path: get(path).headers["content-type"].split(";")[0] for path in seen}
    assert {kind for path, kind in kinds.items() if path.endswith(".js")} == {"text/javascript"}


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/page.css"])
def test_a_page_runs_its_own_files_alone(path):
    headers = get(path).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_holds_no_code_and_names_nothing_elsewhere():
    page = get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|\bstyle=|javascript:|https?://", page)


@pytest.mark.parametrize("name", ["__init__.py", "state.py", "..%2fapp.py", "nothing.js", ".js"])
def test_no_other_file_is_served(name):
    assert get(f"/page/{name}").status_code == 404


def test_the_state_tells_requests_cache_and_heads():
    heads = head_layout(28, 4, 8)
    found = get(
        "/page/state",
        layout=Layout("1x8", 1, heads, "bfloat16", "exact"),
        cache_stats=lambda: CacheStats(3, 40, 100, 64, 0, 0),
    ).json()
    assert (found["running"], found["waiting"], found["max_queue"]) == (0, 0, 1024)
    assert (found["cache"]["used_blocks"], found["cache"]["total_blocks"]) == (3, 40)
    assert (found["cache"]["cached_tokens"], found["cache"]["queried_tokens"]) == (64, 100)
    mesh = found["mesh"]
    assert (mesh["model_query_heads"], mesh["model_key_value_heads"]) == (28, 4)
    assert mesh["query_heads"] == QUERY_HEADS
    assert mesh["key_value_heads"] == [[0], [0], [1], [1], [2], [2], [3], [3]]


def test_what_is_not_known_is_null():
    found = get("/page/state").json()
    assert found["cache"] is None
    assert found["mesh"] is None
