# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness drives the demo model, and gives the scores that we give."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from meshwen import demo
from meshwen.cli import main
from meshwen.errors import MeshwenError
from meshwen.evals.problems import read_problems
from meshwen.evals.run_file import RunFile
from meshwen.evals.styles import prompt_style

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra lm-eval")

HELD_OUT = demo.path() / "heldout.jsonl"
LIMIT = 6


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """Data sets come from files here; what is made of them does not stay."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def model():
    from meshwen.evals.harness import MeshwenLM

    return MeshwenLM("demo", batch_size=4, dtype="float32")


def gsm8k_task(name: str) -> dict:
    """A task of the harness's own, on a local copy of the data."""
    import lm_eval
    import yaml

    path = Path(lm_eval.__file__).parent / "tasks/gsm8k" / f"{name}.yaml"
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = {"train": str(HELD_OUT), "test": str(HELD_OUT)}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
    return task | local | {"task": f"local_{name}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "style"), [("gsm8k", "lm-eval"), ("gsm8k-cot-zeroshot", "lm-eval-cot-zeroshot")]
)
def test_the_harness_gives_the_answers_and_scores_of_our_own_style(
    task, style, model, tmp_path, capsys
):
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model, tasks=[gsm8k_task(task)], limit=LIMIT, log_samples=True, bootstrap_iters=0
    )
    train = ["--train", HELD_OUT] if style == "lm-eval" else []
    out = tmp_path / "run.jsonl"
    options = ["--out", out, "--limit", LIMIT, "--prompt-style", style, "--dtype", "float32"]
    options += ["--max-new-tokens", 256, *train]
    assert main(["eval", "gsm8k", *map(str, options)]) == 0
    ours = RunFile.read(out).records
    samples = found["samples"][f"local_{task}"]
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    assert texts == {number: record["text"] for (number, _), record in ours.items()}
    for way in ("strict-match", "flexible-extract"):
        score = found["results"][f"local_{task}"][f"exact_match,{way}"]
        assert score == np.mean([record["graded"][way] for record in ours.values()])


CANNED = (
    *("so\n#### {gold}", "#### {gold}.", "#### ${gold}", "The answer is {gold}.", "{gold} it is"),
    *("#### {gold} and #### 1", "#### 1 and {gold}", "The answer is {gold},000.", "no number"),
    *("The answer is ${gold}.50.", "#### {gold}\n\nQuestion: next", "-{gold}", "{gold}.0", ""),
)


@pytest.mark.parametrize(
    ("task", "style"), [("gsm8k", "lm-eval"), ("gsm8k-cot-zeroshot", "lm-eval-cot-zeroshot")]
)
def test_the_harness_grades_a_text_as_we_do(task, style):
    import lm_eval
    from lm_eval.api.model import LM

    gold = [one.gold for one in read_problems(HELD_OUT)[: len(CANNED)]]
    texts = [text.format(gold=one) for text, one in zip(CANNED, gold, strict=True)]

    class Canned(LM):
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests, **_):
            return [texts[request.doc_id] for request in requests]

    found = lm_eval.simple_evaluate(
        model=Canned(), tasks=[gsm8k_task(task)], limit=len(texts), bootstrap_iters=0
    )
    ours = prompt_style(style)
    verdicts = set()
    for sample in found["samples"][f"local_{task}"]:
        at, way = sample["doc_id"], sample["filter"]
        verdict = ours.equal(ours.extract[way](texts[at]), gold[at])
        assert sample["exact_match"] == verdict, (way, texts[at], gold[at])
        verdicts.add((way, verdict))
    assert len(verdicts) == 4  # Both ways find some right and some wrong.


def test_log_probabilities_are_the_models(model):
    from lm_eval.api.instance import Instance

    context, text = "A shop sells", " 3 apples"
    request = Instance("loglikelihood", {}, (context, text), 0)
    ((found, greedy),) = model.loglikelihood([request], disable_tqdm=True)
    ids = model.tok_encode(context + text)
    begin = len(model.tok_encode(context))
    logits = np.asarray(model._model([ids])[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = sum(logprobs[at - 1, ids[at]] for at in range(begin, len(ids)))
    assert found == pytest.approx(expected, abs=1e-3)
    best = [int(logits[at - 1].argmax()) for at in range(begin, len(ids))]
    assert greedy == (best == ids[begin:])
    rolling = Instance("loglikelihood_rolling", {}, (context + text,), 0)
    (whole,) = model.loglikelihood_rolling([rolling], disable_tqdm=True)
    ids = [model.eot_token_id, *ids]
    logits = np.asarray(model._model([ids])[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = sum(logprobs[at - 1, ids[at]] for at in range(1, len(ids)))
    assert whole == pytest.approx(expected, abs=1e-3)


def test_generation_arguments_are_the_harnesss():
    from meshwen.evals.harness import sampling_params

    greedy = sampling_params({"until": "Q:", "do_sample": False, "temperature": 0.7})
    assert (greedy.temperature, greedy.stop, greedy.max_new_tokens) == (0.0, ("Q:",), 256)
    drawn = sampling_params({"until": ["a", "b"], "temperature": 0.7, "max_gen_toks": 9, "seed": 3})
    assert (drawn.temperature, drawn.stop, drawn.max_new_tokens) == (0.7, ("a", "b"), 9)
    assert drawn.seed == 3
    ended = sampling_params({"until": ["a", "", "<|im_end|>"]}, "<|im_end|>")
    assert ended.stop == ("a", "<|im_end|>")
    assert sampling_params({}, "<|endoftext|>").stop == ("<|endoftext|>",)
    with pytest.raises(MeshwenError, match="'num_beams' is not supported"):
        sampling_params({"num_beams": 4})


@pytest.mark.slow
def test_the_command_hands_its_options_to_the_harness(tmp_path, monkeypatch):
    import yaml

    task = tmp_path / "task.yaml"
    content = gsm8k_task("gsm8k-cot-zeroshot") | {"task": "mine"}
    task.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("sys.argv", ["meshwen"])
    options = [
        "--model_args",
        "pretrained=demo,dtype=float32,mesh=2",
        "--tasks",
        "mine",
        "--limit",
        "2",
    ]
    options += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    assert main(["eval", "harness", *options]) == 0
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "meshwen"
    assert results["n-samples"]["mine"]["effective"] == 2
    assert results["config"]["batch_size"] == "auto"
