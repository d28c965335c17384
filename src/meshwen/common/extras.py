# SPDX-License-Identifier: Apache-2.0
"""How to install what only some need: the extras of `pyproject.toml`."""

# What an extra installs. The package itself is on no index; these are.
PACKAGES = {
    "client": "httpx",
    "export": "flatbuffers",
    "gguf": "gguf",
    "gsm8k": "pyarrow",
    "lm-eval": "lm-eval",
    "serve": "fastapi uvicorn prometheus-client llguidance",
    "torch": "torch",
    "transformers": "torch transformers",
}


def how_to_install(extra: str) -> str:
    """The commands of which one installs an extra, for the end of an error."""
    return f'pip install {PACKAGES[extra]}, or pip install ".[{extra}]" in a clone of meshwen'
