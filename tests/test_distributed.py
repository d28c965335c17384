# SPDX-License-Identifier: Apache-2.0
"""Several processes, each with its own devices: they give what one gives, or an error."""

import json
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import process_worker
import reference
from checkpoint_writers import write_model
from meshwen.checkpoints import open_checkpoint
from meshwen.cli import main
from meshwen.errors import MeshwenError
from meshwen.parallel.distributed import start
from processes import LIMIT, command, free_port, spawn
from speller import write_tokenizer
from tiny_model import ONE_LAYER

pytestmark = pytest.mark.usefixtures("unoptimised")
FAST = ("1x8 fast", "data=2,model=4 fast")
EXACT = "2x4 exact"
QUESTION = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"
ANSWER = "4*7=28 dollars\n50-28=22 dollars back\n#### 22\n"


@pytest.fixture
def port():
    return free_port()


def generate(port, index, *arguments) -> subprocess.Popen:
    return command("generate", port, index, *arguments)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that writes little and compiles fast, with a tokenizer."""
    # Two processes read equally much of it, and have few copies of key/value heads.
    config = replace(ONE_LAYER, vocab_size=264, num_attention_heads=8, num_key_value_heads=4)
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    return write_model(folder, config, reference.random_weights(config))


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny):
    """What each of two processes sees, by run."""
    folder, address = tmp_path_factory.mktemp("processes"), f"127.0.0.1:{free_port()}"
    outputs = [folder / str(index) for index in range(2)]
    started = [
        spawn("process_worker.py", address, index, output, tiny, *FAST, EXACT)
        for index, output in enumerate(outputs)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads(output.read_bytes()) for output in outputs]


@pytest.fixture(scope="module")
def one_process(tiny):
    """What one process sees in a run."""
    return cache(lambda run: process_worker.observe(str(tiny), *run.split()))


@pytest.mark.slow
@pytest.mark.parametrize("run", FAST)
def test_two_processes_give_what_one_gives(found, one_process, run):
    expected = one_process(run)
    for process in found:
        assert process[run]["tokens"] == expected["tokens"]
        np.testing.assert_allclose(process[run]["logits"], expected["logits"], rtol=0, atol=2e-4)
        np.testing.assert_allclose(
            process[run]["logprobs"], expected["logprobs"], rtol=0, atol=2e-4
        )


@pytest.mark.slow
def test_exact_numerics_give_the_bits_of_one_device(found, one_process):
    expected = one_process("1 exact")
    for process in found:
        assert process[EXACT]["logits"] == expected["logits"]
        assert process[EXACT]["logprobs"] == expected["logprobs"]


@pytest.mark.slow
def test_each_process_reads_the_bytes_of_its_own_devices(found, one_process, tiny):
    everything = one_process("1x8 fast")["bytes"]
    ours, theirs = (process["1x8 fast"]["bytes"] for process in found)
    with open_checkpoint(str(tiny)) as checkpoint:
        stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert ours + theirs == everything
    assert ours == theirs
    assert ours < 0.55 * stored  # Half, and what several devices hold copies of.


@pytest.mark.slow
def test_process_0_alone_prints_and_alone_reads_the_prompt(port):
    started = [generate(port, index, "--mesh", "1x8") for index in range(2)]
    (out, err), (others_out, others_err) = (
        process.communicate(text, timeout=200)
        for process, text in zip(started, (QUESTION, "not this"), strict=True)
    )
    assert [process.returncode for process in started] == [0, 0], err + others_err
    assert out == ANSWER
    assert "mesh: 1x8, 8 simulated cpu devices" in err
    assert "first token after" in err
    assert (others_out, others_err) == ("", "")


@pytest.mark.slow
def test_verify_over_processes_has_the_outcome_of_one(port, tiny, tmp_path, capsys):
    files = [tmp_path / name for name in ("prompts", "certificate.json")]
    files[0].write_text('{"prompt_tokens": [1, 2, 3]}\n{"prompt_tokens": [4]}\n', encoding="utf-8")
    asked = ("--model", tiny, "--numerics", "exact")
    meshes = ("--meshes", "2x4", "--max-new-tokens", 3)
    together = (*asked, *meshes, "--prompts", files[0], "--json", files[1])
    started = [
        # The other process needs no file: process 0 reads and writes for both.
        command("verify", port, 0, *together),
        command("verify", port, 1, *together[:-4]),
    ]
    results = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    assert "every promise was kept" in results[0][0]
    assert results[1] == ("", "")
    one = ("verify", *asked, "--meshes", 1, "--against", files[1])
    assert main([*map(str, one)]) == 0
    assert "the outcome is the certificate's, to the bit" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_over_processes_goes_on_and_writes_in_process_0_alone(port, tiny, tmp_path):
    data, folder, report = (tmp_path / name for name in ("data.jsonl", "runs", "runs.html"))
    problems = [{"question": f"{n} + 1 = ?", "answer": f"#### {n + 1}"} for n in range(3)]
    data.write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    asked = ("--model", tiny, "--data", data, "--prompt-style", "demo", "--numerics", "exact")
    asked += ("--max-new-tokens", 8)

    meshes = ("meshes", "--meshes", "1x8,2x4", "--out", folder, "--resume", "--html", report)
    assert main(["eval", *map(str, (*meshes, *asked, "--limit", 1))]) == 0
    report.unlink()
    before = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert len(before) == 2
    started = [
        command("eval", port, 0, *meshes, *asked),
        command("eval", port, 1, *meshes, *asked, "--data", tmp_path / "nothing"),
    ]
    results = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    assert "2x4" in results[0][0]
    assert results[1] == ("", "")
    assert "</html>" in report.read_text(encoding="utf-8")
    alone = tmp_path / "alone.jsonl"
    assert main(["eval", "gsm8k", "--out", str(alone), *map(str, asked)]) == 0
    for other, begun in before.items():
        assert other.read_bytes().startswith(begun)
        assert main(["eval", "compare", str(alone), str(other), "--require", "identical"]) == 0


@pytest.mark.slow
def test_the_others_stop_when_a_process_dies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # A kill may leave half an entry.
    prompts = tmp_path / "prompts"
    prompts.write_text(f"{QUESTION}\n" * 1000, encoding="utf-8")
    arguments = ("--prompts-file", prompts, "--batch-size", 1, "--mesh", "1x8")
    pairs = []
    try:
        for victim in (0, 1):  # Both at the same time: most of it is waiting.
            port = free_port()
            started = [generate(port, index, *arguments) for index in range(2)]
            pairs.append(started if victim == 0 else started[::-1])
            assert started[0].stdout.readline().startswith("[1/1000]")
        for victim, _ in pairs:
            victim.kill()
        killed = time.monotonic()
        for _, survivor in pairs:
            _, errors = survivor.communicate(timeout=LIMIT)
            assert time.monotonic() - killed < LIMIT
            assert survivor.returncode != 0
            assert "if another has ended, look there" in errors or "another task died" in errors
    finally:
        for process in [process for pair in pairs for process in pair]:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_options_that_differ_are_refused_by_all(port):
    started = [generate(port, index, "hi", "--seed", index + 7) for index in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 2
        assert "--seed is 7 in process 0 but 8 in process 1" in errors


@pytest.mark.slow
def test_a_model_with_other_weights_in_one_process_is_refused_by_all(
    port, tiny, tmp_path, monkeypatch
):
    """And a proxy that the environment names has no part in it."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    other = shutil.copytree(tiny, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    arguments = ("--raw", "hi", "--mesh", 2, "--model")
    started = [generate(port, index, *arguments, one) for index, one in enumerate((tiny, other))]
    for process in started:
        _, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 2, errors
        assert "the processes' models: tensor " in errors


@pytest.mark.slow
def test_an_error_of_the_prompt_and_of_the_mesh_ends_all(port):
    for arguments, message in (
        (("--mesh", "1x3"), "3 devices"),
        (("--mesh", "2", "--prompts-file", "no"), "no:"),
    ):
        started = [generate(port, index, *arguments) for index in range(2)]
        for process in started:
            _, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 2
            assert message in errors
        port = free_port()


@pytest.mark.slow
def test_process_0_does_not_wait_for_others_forever(port):
    own = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 3, "--process-id", 0)
    process = spawn("-m", "meshwen", "generate", "hi", *own, "--coordinator-timeout", 1)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 2, errors
    assert "not all of the 3 processes came within 1 s; processes 1, 2 did not" in errors


def test_sigterm_ends_a_process_at_once(port):
    program = (
        "import time\n"
        "from meshwen.parallel.distributed import start\n"
        f"start('127.0.0.1:{port}', 1, 0)\n"
        "print('joined', flush=True)\n"
        "time.sleep(60)\n"  # JAX's own service would let it end here, with status 0.
    )
    process = spawn("-c", program)
    try:
        assert process.stdout.readline() == "joined\n"
        process.terminate()
        assert process.wait(LIMIT) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_coordinator_that_never_comes_is_an_error(port):
    with pytest.raises(MeshwenError, match=rf"127.0.0.1:{port}: no answer within 0 s .* start it"):
        start(f"127.0.0.1:{port}", 2, 1, timeout=0.1)


def test_a_port_in_use_is_an_error(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(MeshwenError, match=r"cannot listen there .*give another port"):
            start(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0), "no address"),
        (("host:99999", 2, 0), "no address"),
        (("host:1", 2, None), "this one's id, is missing"),
        (("host:1", None, 0), "the number of processes"),
        (("host:1", 2, 2), "id 2 is impossible among 2"),
        (("auto", 2, None), "knows the number"),
    ],
)
def test_an_impossible_argument_is_refused(arguments, message):
    with pytest.raises(MeshwenError, match=message):
        start(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate hi --process-id 1", "need --coordinator HOST:PORT"),
        ("chat --coordinator h:1 --num-processes 2 --process-id 0", "chat runs in one process"),
    ],
)
def test_a_command_line_that_cannot_run_is_refused(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err
