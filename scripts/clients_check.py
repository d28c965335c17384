# SPDX-License-Identifier: Apache-2.0
"""Runs other people's clients against `meshwen serve`, each as its users have it.

    python scripts/clients_check.py                       against a demo model that it serves
    python scripts/clients_check.py --url http://HOST:PORT --model NAME
    python scripts/clients_check.py --only openai_python llm

Each client is installed from its registry into an environment of its own below --folder, which
later runs use again. Every check prints a line; the exit status is 1 where one fails. What they do
is in `scripts/clients/`. Whether answers are right is looked at with the demo model alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwen import demo

CLIENTS = Path(__file__).parent / "clients"
HELD_OUT = demo.path() / "heldout.jsonl"
PROBLEMS = 20  # of the harness
INSTALLING, CHECKING, STARTING = 1200, 600, 300  # seconds


@dataclass(frozen=True)
class Served:
    """What is asked: a server, its key, and the name of its model."""

    url: str
    key: str
    model: str

    @property
    def environment(self) -> dict[str, str]:
        """Of a client's process."""
        problem = json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])
        answer = problem["answer"].rpartition("#### ")[2] if self.model == "demo" else ""
        return dict(os.environ) | {
            "CHECK_URL": self.url,
            "CHECK_KEY": self.key,
            "CHECK_MODEL": self.model,
            "CHECK_QUESTION": problem["question"],
            "CHECK_ANSWER": answer and f"#### {answer}",
            "OPENAI_API_KEY": self.key,
            "PYTHONPATH": "",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # It would be fetched.
        }


class CheckFailedError(Exception):
    """A check of a command, in a few words."""


def python_environment(folder: Path, packages: Sequence[str]) -> Path:
    """The `bin` of an environment that has these packages."""
    done = folder / "installed.txt"
    if not done.exists() or done.read_text() != "\n".join(packages):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=120)
        install = [folder / "bin/python", "-m", "pip", "install", "-q", "--no-compile", *packages]
        subprocess.run(install, check=True, timeout=INSTALLING)
        done.write_text("\n".join(packages))
    return folder / "bin"


def run(
    command: Sequence[object],
    served: Served,
    more: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """What a command prints.

    Raises:
        CheckFailedError: it fails, or takes too long.
    """
    try:
        found = subprocess.run(
            [str(one) for one in command],
            check=False,
            env=served.environment | dict(more or {}),
            cwd=cwd,
            timeout=CHECKING,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise CheckFailedError(f"took longer than {CHECKING} s") from None
    if found.returncode:
        lines = (found.stderr or found.stdout).strip().splitlines() or ["no output"]
        raise CheckFailedError(f"status {found.returncode}: {' / '.join(lines[-3:])[:600]}")
    return found.stdout


def passes(command: Sequence[object], served: Served) -> bool:
    """Whether a command succeeds, which prints for itself."""
    arguments = [str(one) for one in command]
    found = subprocess.run(arguments, check=False, env=served.environment, timeout=CHECKING)
    return found.returncode == 0


def script(name: str, *packages: str) -> Callable[[Served, Path], bool]:
    """A client whose checks are a Python script."""

    def checks(served: Served, folder: Path) -> bool:
        python = python_environment(folder, packages) / "python"
        command = [python, CLIENTS / f"{name}.py"]
        return passes(command, served)

    return checks


def node(served: Served, folder: Path) -> bool:
    """OpenAI's client for Node."""
    if not (folder / "node_modules/openai").exists():
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--silent", "--prefix", str(folder), "openai"]
        subprocess.run(install, check=True, timeout=INSTALLING)
    shutil.copy(CLIENTS / "openai_node.mjs", folder)
    command = ["node", folder / "openai_node.mjs"]
    return passes(command, served)


def said(client: str, name: str, check: Callable[[], None]) -> bool:
    """Runs a check of a command, and prints its line."""
    began = time.monotonic()
    try:
        check()
    except CheckFailedError as error:
        print(f"FAILED  {client}: {name}: {error}", flush=True)
        return False
    print(f"ok      {client}: {name} ({time.monotonic() - began:.1f} s)", flush=True)
    return True


def llm(served: Served, folder: Path) -> bool:
    """The command `llm`."""
    command = python_environment(folder, ["llm"]) / "llm"
    home = folder / "home"
    home.mkdir(exist_ok=True)
    model = {"model_id": "served", "model_name": served.model, "api_base": f"{served.url}/v1"}
    lines = [f"{'-' if i == 0 else ' '} {k}: {v}" for i, (k, v) in enumerate(model.items())]
    (home / "extra-openai-models.yaml").write_text("\n".join(lines) + "\n")
    asked = served.environment["CHECK_QUESTION"]

    def chats(*options: str) -> None:
        given = ["prompt", "-m", "served", "--key", served.key, "-o", "temperature", "0", *options]
        text = run([command, *given, asked], served, {"LLM_USER_PATH": str(home)}).strip()
        if not text.endswith(served.environment["CHECK_ANSWER"]):
            raise CheckFailedError(f"{text!r:.300} is not right")

    return all(
        [said("llm", "a streamed chat", chats), said("llm", "a chat", lambda: chats("--no-stream"))]
    )


def lm_eval(served: Served, folder: Path) -> bool:
    """lm-evaluation-harness: the score of `meshwen eval`, by both of its models for servers."""
    command = python_environment(folder, ["lm-eval[api]", "transformers", "datasets"]) / "lm_eval"
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    text = (CLIENTS / "heldout.yaml").read_text().replace("HELD_OUT", str(HELD_OUT))
    (tasks / "heldout.yaml").write_text(text)
    expected = own_score(served, folder / "own.jsonl")

    def scores(model: str, path: str, **more: str) -> None:
        given = {"model": served.model, "base_url": f"{served.url}/v1/{path}", **more}
        arguments = {"num_concurrent": "8", "max_retries": "1", **given}
        out = folder / model
        shutil.rmtree(out, ignore_errors=True)
        run(
            [
                *(command, "--model", model, "--tasks", "meshwen_heldout"),
                *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
                *("--include_path", tasks, "--apply_chat_template", "--limit", PROBLEMS),
                *("--output_path", out),
            ],
            served,
            {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
            folder,
        )
        (found,) = out.rglob("results_*.json")
        score = json.loads(found.read_text())["results"]["meshwen_heldout"]
        if score["exact_match,last-number"] != expected:
            raise CheckFailedError(f"its score is {score}, that of meshwen eval {expected}")

    return all(
        [
            said("lm_eval", "chat", lambda: scores("local-chat-completions", "chat/completions")),
            said(
                "lm_eval",
                "completions",
                lambda: scores(
                    "local-completions",
                    "completions",
                    tokenizer=str(plain_tokenizer(folder)),
                ),
            ),
        ]
    )


def plain_tokenizer(folder: Path) -> Path:
    """The demo's tokenizer as its file has it; transformers' Qwen2 class splits its numbers."""
    copy = folder / "tokenizer"
    copy.mkdir(exist_ok=True)
    shutil.copy(demo.path() / "tokenizer.json", copy)
    config = json.loads((demo.path() / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def own_score(served: Served, out: Path) -> float:
    """That of `meshwen eval gsm8k --url`."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "meshwen", "eval", "gsm8k", "--url", served.url, "--json"]
    options = ["--out", out, "--limit", PROBLEMS, "--data", HELD_OUT, "--prompt-style", "demo"]
    environment = {"MESHWEN_API_KEY": served.key, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    found = run([*command, *options, "--model", served.model], served, environment)
    return float(json.loads(found)["accuracy"])


def meshwen_eval(served: Served, folder: Path) -> bool:
    """`meshwen eval` offline and over the server: the same answers, token for token."""
    folder.mkdir(parents=True, exist_ok=True)

    def same() -> None:
        offline = folder / "offline.jsonl"
        offline.unlink(missing_ok=True)
        own_score(served, folder / "served.jsonl")
        own = [sys.executable, "-m", "meshwen", "eval"]
        path = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        asked = ["gsm8k", "--out", offline, "--limit", PROBLEMS, "--numerics", "exact"]
        run([*own, *asked], served, path)
        both = ["compare", offline, folder / "served.jsonl", "--require", "identical"]
        run([*own, *both], served, path)

    return said("meshwen_eval", "the same tokens as without a server", same)


CHECKS: Mapping[str, Callable[[Served, Path], bool]] = {
    "openai_python": script("openai_python", "openai"),
    "openai_node": node,
    "anthropic_python": script("anthropic_python", "anthropic"),
    "litellm_python": script("litellm_python", "litellm"),
    "langchain_python": script("langchain_python", "langchain-openai"),
    "llm": llm,
    "lm_eval": lm_eval,
    "meshwen_eval": meshwen_eval,
}


def demo_with_tools(folder: Path) -> Path:
    """A copy of the demo checkpoint whose chat template takes tools, but says nothing of them.

    It knows none; so that clients can ask for calls, what is generated has to be held to them.
    """
    copy = folder / "demo-with-tools"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(demo.path(), copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    template = config["chat_template"].replace("message.content", "(message.content or '')")
    config["chat_template"] = re.sub(r"{%- if tools %}.*?{%- endif %}", "", template, count=1)
    path.write_text(json.dumps(config), encoding="utf-8")
    return copy


@contextlib.contextmanager
def demo_server(folder: Path) -> Iterator[Served]:
    """Serves the demo model, in exact numerics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = "check-" + os.urandom(8).hex()
    command = [sys.executable, "-m", "meshwen", "serve", "--port", str(port)]
    command += ["--model", str(demo_with_tools(folder)), "--served-model-name", "demo"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, "--numerics", "exact"],
            env=dict(os.environ) | {"MESHWEN_API_KEY": key},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            if not healthy(url, server):
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                sys.exit("the server did not start: " + " / ".join(lines[-5:]))
            yield Served(url, key, "demo")
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def healthy(url: str, server: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether the server, which may be a process of ours, comes to answer in time."""
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline and (server is None or server.poll() is None):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return True
    return False


def checked(name: str, served: Served, folder: Path) -> bool:
    """Whether all checks of a client pass; one that cannot be installed fails."""
    try:
        return CHECKS[name](served, folder / name)
    except (subprocess.SubprocessError, OSError, CheckFailedError) as error:
        text = re.sub(r"\s+", " ", str(error))[:600]
        print(f"FAILED  {name}: {text}", flush=True)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs; default: the demo model's own")
    parser.add_argument("--model", default="demo", help="the name of its model")
    parser.add_argument("--key", default=os.environ.get("MESHWEN_API_KEY") or "none")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "clients")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS])
    given = parser.parse_args()
    if given.url and not healthy(given.url):
        sys.exit(f"{given.url} does not come to answer /health")
    asked = contextlib.nullcontext(Served(given.url, given.key, given.model))
    with asked if given.url else demo_server(given.folder) as served:
        passed = {name: checked(name, served, given.folder) for name in given.only}
    failed = [name for name, fine in passed.items() if not fine]
    print(f"failed: {', '.join(failed)}" if failed else f"all of {', '.join(passed)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
