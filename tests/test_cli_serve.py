# SPDX-License-Identifier: Apache-2.0
"""`meshwen serve` with the demo model: what is refused, what is printed, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from meshwen import Qwen2ForCausalLM, demo
from meshwen.checkpoints import open_checkpoint
from meshwen.cli import main
from meshwen.server.fingerprint import system_fingerprint
from meshwen.server.warmup import warm_up

LIMIT = 120  # seconds
PROMPT = "Tom has 3 apples"


def fingerprint(name="demo", **options) -> str:
    model = Qwen2ForCausalLM.from_pretrained(name, **options)
    with open_checkpoint(str(name)) as checkpoint:
        return system_fingerprint(checkpoint, model)


def test_a_fingerprint_follows_from_what_decides_bits_and_from_nothing_else(tmp_path):
    exact = fingerprint(numerics="exact")
    assert re.fullmatch("fp_[0-9a-f]{16}", exact)
    assert fingerprint(numerics="exact", mesh="1x2", max_num_seqs=3) == exact
    fast = {fingerprint(), fingerprint(mesh="1x2")}
    others = {fingerprint(dtype="float32", numerics="exact"), fingerprint(quantization="int8")}
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((demo.path() / file).read_bytes())
    config = (demo.path() / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert fingerprint(tmp_path, numerics="exact") == exact
    changed = json.loads(config) | {"chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
    others.add(fingerprint(tmp_path, numerics="exact"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    weights = bytearray((demo.path() / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    others.add(fingerprint(tmp_path, numerics="exact"))
    assert len({exact, *fast, *others}) == 7


def test_warming_up_leaves_nothing_behind_that_another_finds():
    model = Qwen2ForCausalLM.from_pretrained("demo", max_num_seqs=2)
    warm_up(model.engine)
    assert not model.engine.busy
    assert model.engine.cache_stats.used_blocks == 0
    tokens = [[1] * 100, [2] * 100]
    cached = [one.cached_tokens for one in model.generate(tokens, max_new_tokens=1)]
    assert cached == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port must be from 0 to 65535, not 99999"),
        (["--api-key", "se cret"], "--api-key must be visible ASCII characters, without blanks"),
        (["--api-key-file", "/nope"], "--api-key-file /nope cannot be read: No such file"),
        (["--host", "no such host"], "--host must be an address, not 'no such host'"),
        (["--max-body-size", "much"], "--max-body-size must be a number of bytes"),
        (["--ssl-keyfile", "/x"], "--ssl-keyfile needs its certificate"),
        (["--model", "/nope"], "/nope does not exist"),
        (["--mesh", "2y4"], "--mesh must be such as 8, 1x8, 2x4 or data=2,model=4, not '2y4'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(capsys, options, message):
    assert main(["serve", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "loaded" not in err
    assert "cret" not in err


@pytest.mark.slow
@pytest.mark.parametrize("seconds", ["30", "0"])
def test_sigterm_in_mid_stream_lets_the_answer_finish_in_its_time(seconds):
    command = [sys.executable, "-m", "meshwen", "serve", "--port", "0", "--no-warmup"]
    command += ["--shutdown-timeout", seconds]
    keys = {**os.environ, "MESHWEN_API_KEY": "the-key"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=keys) as process:
        try:
            lines = []
            while not lines or not lines[-1].startswith("ready at "):
                lines.append(process.stderr.readline())
                assert lines[-1]
            body = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
            asked = urllib.request.Request(
                lines[-1].split()[2] + "/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json", "Authorization": "Bearer the-key"},
            )
            with urllib.request.urlopen(asked, timeout=LIMIT) as stream:
                got = [stream.readline().decode()]
                process.send_signal(signal.SIGTERM)
                got += [line.decode() for line in stream if line.strip()]
            _, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    finished = seconds == "30"
    assert process.returncode == (0 if finished else 128 + signal.SIGTERM)
    assert any('"finish_reason":"length"' in line for line in got) == finished
    assert any("shutting down" in line for line in got) != finished
    assert "stopping: " in err
    assert err.endswith("stopped\n")
    assert PROMPT not in err
    assert "the-key" not in "".join(lines) + err
