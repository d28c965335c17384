# SPDX-License-Identifier: Apache-2.0
"""Completions: texts and token ids in, in the shapes that OpenAI's clients and lm-eval parse."""

import pytest

from meshwen.server.completions import CompletionRequest
from openai_streams import choices, chunks, without_id
from serving import EOS, in_loop, logprob, serving, tokenizer, top_logprobs

PATH = "/v1/completions"
TEXT = "é 👩‍👧 日本 STO then STO"


async def ask(server, **fields):
    response = await server.client.post(PATH, json={"prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(server, **fields):
    response = await server.client.post(PATH, json={"prompt": "Hi", "stream": True, **fields})
    assert response.status_code == 200, response.text
    return chunks(response.text)


async def refused(server, **fields):
    response = await server.client.post(PATH, json={"prompt": "Hi", **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def joined(parts):
    """The lists of log-probabilities of a choice's chunks, put together."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name in found:
            found[name] += (part["logprobs"] or found | {name: []})[name]
    return found


@in_loop
async def test_a_response_has_the_shape_that_openai_gives_it():
    async with serving("Hello!") as server:
        found = await ask(server)
    assert found.pop("id").startswith("cmpl-")
    assert isinstance(found.pop("created"), int)
    prompt, answer = len(tokenizer().encode("Hi")), len(tokenizer().encode("Hello!")) + 1
    assert found == {
        "object": "text_completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "text": "Hello!",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        },
        "system_fingerprint": "fp_test",
    }


@in_loop
async def test_an_answer_has_sixteen_tokens_unless_more_are_asked_for():
    async with serving("a b " * 40) as server:
        found = await ask(server)
        await ask(server, max_tokens=5000)
        first, second = (one.sampling for one in server.engine.requests)
    assert found["usage"]["completion_tokens"] == first.max_new_tokens == 16
    assert found["choices"][0]["finish_reason"] == "length"
    assert second.max_new_tokens == server.serving.max_model_len


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[64, 65]]),
        (["ab", "b"], [[64, 65], [65]]),
        ([64, 65], [[64, 65]]),
        ([[64, 65], [65]], [[64, 65], [65]]),
    ],
)
@in_loop
async def test_a_prompt_is_text_or_token_ids_one_or_several(prompt, expected):
    async with serving(lambda request, choice: "ab"[len(request.prompt_tokens) - 1]) as server:
        found = await ask(server, prompt=prompt, n=2)
        asked = [list(one.prompt_tokens) for one in server.engine.requests]
    assert asked == expected
    assert [one["index"] for one in found["choices"]] == list(range(2 * len(expected)))
    answers = ["ab"[len(one) - 1] for one in expected for _ in range(2)]
    assert [one["text"] for one in found["choices"]] == answers
    assert found["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("stop", [None, ["STOP"], ["then"], ["日"]])
@in_loop
async def test_streamed_and_whole_answers_are_the_same_and_no_logprob_is_lost(stop):
    fields = {
        "prompt": ["a", "b"],
        "logprobs": 2,
        "stop": stop,
        "return_token_ids": True,
        "max_tokens": 100,
    }
    async with serving(TEXT) as server:
        whole = await ask(server, **fields)
        *found, usage = await stream(server, **fields, stream_options={"include_usage": True})
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = choices(found, choice["index"])
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert joined(parts) == choice["logprobs"]
        assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [one["finish_reason"] for one in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]


@in_loop
async def test_logprobs_are_lists_of_texts_values_likeliest_and_offsets():
    async with serving("Yes H") as server:
        (choice,) = (await ask(server, logprobs=1))["choices"]
    ids = [*tokenizer().encode("Yes H"), EOS]
    texts = [tokenizer().decode([token], skip_special_tokens=False) for token in ids]
    assert choice["logprobs"] == {
        "tokens": texts,
        "token_logprobs": [logprob(token) for token in ids],
        "top_logprobs": [{text: -1 / 16} for text in texts],
        "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
    }


@in_loop
async def test_parts_of_a_character_are_written_as_bytes_or_ids_and_begin_where_it_does():
    async with serving("日!") as server:
        (choice,) = (await ask(server, logprobs=0))["choices"]
        (by_id,) = (await ask(server, logprobs=0, return_tokens_as_token_ids=True))["choices"]
    assert choice["logprobs"]["tokens"][:4] == [
        "bytes:\\xe6",
        "bytes:\\x97",
        "bytes:\\xa5",
        "!",
    ]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 0, 1]
    ids = [*tokenizer().encode("日!"), EOS]
    # With none of the likeliest, each stands alone.
    assert choice["logprobs"]["top_logprobs"][3] == {"!": logprob(ids[3])}
    assert by_id["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]


def lm_eval_loglikelihood(choice, context_length):
    """What lm-evaluation-harness reads: the continuation's log-likelihood, and if it is greedy."""
    found = choice["logprobs"]
    values = found["token_logprobs"][context_length:-1]
    tops = found["top_logprobs"][context_length:-1]
    greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), greedy


@in_loop
async def test_lm_evals_loglikelihood_request_is_scored():
    prompts = [[64, 65, 72, 7], [65, 64, 14]]
    fields = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234}
    async with serving("H") as server:
        found = await ask(server, model="demo", prompt=prompts, **fields)
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        expected = sum(map(logprob, prompt[2:]))
        likeliest = all(top_logprobs(one, 1)[0][1] <= logprob(one) for one in prompt[2:])
        assert lm_eval_loglikelihood(choice, 2) == (expected, likeliest)
        assert choice["text"] == tokenizer().decode(prompt) + "H"
        assert choice["logprobs"]["text_offset"][-1] == len(tokenizer().decode(prompt))


@in_loop
async def test_an_echo_alone_scores_the_prompt_and_generates_nothing():
    async with serving("H") as server:
        found = await ask(server, prompt="a<|im_end|>b", echo=True, logprobs=0, max_tokens=0)
        streamed = await stream(server, prompt="a<|im_end|>b", echo=True, max_tokens=0)
    (choice,) = found["choices"]
    assert choice["text"] == "a<|im_end|>b"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["text_offset"] == [0, 1, 11]
    assert found["usage"]["completion_tokens"] == 0
    assert [one["text"] for one in choices(streamed, 0)] == ["a<|im_end|>b", ""]


@in_loop
async def test_an_echo_comes_before_each_answer():
    async with serving(lambda request, choice: "xy"[choice]) as server:
        for prompt in (["a", "b"], [[64], [65]]):
            found = await ask(server, prompt=prompt, n=2, echo=True)
            streamed = await stream(server, prompt=prompt, n=2, echo=True)
            expected = ["ax", "ay", "bx", "by"]
            assert [one["text"] for one in found["choices"]] == expected
            for index, text in enumerate(expected):
                assert "".join(one["text"] for one in choices(streamed, index)) == text


@in_loop
async def test_an_echo_of_ids_has_special_tokens_as_they_are_written():
    async with serving("H") as server:
        (choice,) = (await ask(server, prompt=[64, EOS], echo=True))["choices"]
    assert choice["text"] == "a<|im_end|>H"


@in_loop
async def test_prompt_logprobs_are_in_each_choice_as_vllm_has_them():
    async with serving("H") as server:
        found = await ask(server, prompt=[[64, 65], [72, 64]], prompt_logprobs=0, logprobs=3)
        more = await ask(server, prompt=[64, 65], prompt_logprobs=2, logprobs=0)
    first, second = (one["prompt_logprobs"] for one in found["choices"])
    value = {"logprob": logprob(65), "rank": None, "decoded_token": "b"}
    assert first == [None, {"65": value}]
    assert list(second[1]) == ["64"]
    (choice,) = more["choices"]
    assert {k: v["rank"] for k, v in choice["prompt_logprobs"][1].items()} == {"65": 1, "66": 2}
    assert {len(top) for top in choice["logprobs"]["top_logprobs"]} == {1}


@in_loop
async def test_a_model_without_a_tokenizer_takes_token_ids_alone():
    async with serving("H", with_tokenizer=False) as server:
        found = await ask(server, prompt=[64], logprobs=1, echo=True, return_token_ids=True)
        error = await refused(server, prompt="a")
    (choice,) = found["choices"]
    assert choice["token_ids"] == [*tokenizer().encode("H"), EOS]
    assert choice["logprobs"]["tokens"][0] == "token_id:64"
    assert "tokenizer" in error["message"]


@in_loop
async def test_null_changes_nothing_in_any_field():
    nothing = dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt", "stream"})
    async with serving("H") as server:
        plain = without_id(await ask(server))
        assert without_id(await ask(server, **nothing)) == plain
        assert without_id(await ask(server, best_of=1, echo=False, user="me")) == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"messages": []}, "messages"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"stream": True, "echo": True, "logprobs": 1}, "stream"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": [5] * 1024}, "prompt"),
        ({"prompt": [1024]}, None),
        ({"prompt": [1 << 70]}, None),
        ({"prompt": ""}, None),
        ({"best_of": 2}, None),
    ],
)
@in_loop
async def test_what_cannot_be_is_refused_by_its_field(fields, param):
    async with serving("H") as server:
        error = await refused(server, **fields)
        assert error["param"] == param
        assert (param or "prompt" if "prompt" in fields else next(iter(fields))) in error["message"]
        assert not server.engine.requests


@in_loop
async def test_several_prompts_are_refused_together_before_any_is_computed():
    async with serving("H") as server:
        error = await refused(server, prompt=[[64], [1024]], stream=True)
    assert "1024" in error["message"]
    assert server.engine.steps == 0


@in_loop
async def test_a_request_that_takes_too_long_ends():
    async with serving("Hello!", request_timeout=0.05) as server:
        server.engine.go.clear()
        response = await server.client.post(PATH, json={"prompt": "Hi"})
        server.engine.go.set()
    assert response.status_code == 504


@in_loop
async def test_without_a_seed_each_prompt_has_one_of_its_own():
    async with serving("Hello!") as server:
        await ask(server, prompt=["Hi"] * 4, temperature=1)
        drawn = [one.sampling.seed for one in server.engine.requests]
        await ask(server, prompt=["Hi"] * 2, temperature=1, seed=5)
        given = [one.sampling.seed for one in server.engine.requests[4:]]
    assert len(set(drawn)) == 4
    assert given == [5, 5]
