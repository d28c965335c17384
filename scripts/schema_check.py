# SPDX-License-Identifier: Apache-2.0
"""Schemathesis over the server's OpenAPI document.

    python scripts/schema_check.py [--schemathesis PATH] [--url http://HOST:PORT] [--examples 50]

Without --url it starts `meshwen serve --model demo` and ends it. `schemathesis` is a program of an
environment of its own (`pip install schemathesis`); further arguments are handed on to it. All its
checks but one must hold: that every body which the schema allows is accepted. A schema cannot say
which model there is, how long a prompt may be, and which fields do not go together. Afterwards the
server must be healthy, with nothing unfinished and no step of the engine failed.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys

from raw_http import fetch
from serve_load import at_rest, healthy, start, stop

PHASES = "examples,coverage,fuzzing"
MOST_SECONDS = 3600


def check(options: argparse.Namespace, url: str, further: list[str]) -> bool:
    """Runs the checks; whether they hold."""
    command = [options.schemathesis, "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--exclude-checks", "positive_data_acceptance", "--phases", PHASES]
    command += ["--max-examples", str(options.examples), "--seed", "1", "--warnings", "off"]
    done = subprocess.run([*command, *further], check=False, timeout=MOST_SECONDS)
    metrics = asyncio.run(at_rest(url))
    health = asyncio.run(fetch(url, "/health"))
    unfinished = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
    failures = metrics["vllm:engine_failures_total"]
    print(f"unfinished: {unfinished:.0f}, engine failures: {failures:.0f}, {health.status}")
    return not (done.returncode or unfinished or failures) and health.status == 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs; default: start one")
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--examples", type=int, default=50, help="bodies for each operation")
    options, further = parser.parse_known_args()
    server, url = (None, options.url) if options.url else start([])
    try:
        asyncio.run(healthy(url, server))
        well = check(options, url, further)
    finally:
        stop(server)
    sys.exit(not well)


if __name__ == "__main__":
    main()
