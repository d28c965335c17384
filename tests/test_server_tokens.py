# SPDX-License-Identifier: Apache-2.0
"""Token ids in, token ids and log-probabilities out."""

import pytest

from openai_streams import choices, chunks
from serving import EOS, in_loop, logprob, serving, tokenizer

PATH = "/inference/v1/generate"


async def ask(server, sampling=None, **fields):
    body = {"token_ids": [64, 65, 66], "sampling_params": sampling or {}, **fields}
    return await server.client.post(PATH, json=body)


@pytest.mark.parametrize("with_tokenizer", [True, False])
@in_loop
async def test_ids_and_logprobs_come_out_streamed_and_whole(with_tokenizer):
    sampling = {"logprobs": 1, "n": 2}
    async with serving("日!", with_tokenizer=with_tokenizer) as server:
        whole = (await ask(server, sampling)).json()
        found = chunks((await ask(server, sampling, stream=True)).text)
    ids = [*tokenizer().encode("日!"), EOS]
    for choice in whole["choices"]:
        parts = choices(found, choice["index"])
        assert choice["token_ids"] == ids
        assert [token for part in parts for token in part["token_ids"]] == ids
        listed = choice["logprobs"]["content"]
        assert [one for part in parts for one in part["logprobs"]["content"]] == listed
        assert [one["logprob"] for one in listed] == [logprob(token) for token in ids]
        assert [one["token"] for one in listed] == [f"token_id:{token}" for token in ids]
        assert [len(one["top_logprobs"]) for one in listed] == [1] * len(ids)
        assert choice["finish_reason"] == parts[-1]["finish_reason"] == "stop"
        assert {part["finish_reason"] for part in parts[:-1]} == {None}
    assert whole["request_id"] == whole["id"]
    assert whole["usage"]["completion_tokens"] == 2 * len(ids)


@in_loop
async def test_given_tokens_are_scored_and_none_is_generated():
    async with serving("H") as server:
        response = await ask(server, {"max_tokens": 0, "prompt_logprobs": 0})
        streamed = await ask(server, {"max_tokens": 0}, stream=True)
    found = response.json()
    (choice,) = found["choices"]
    assert choice["token_ids"] == []
    assert choice["finish_reason"] == "length"
    first, *others = found["prompt_logprobs"]
    assert first is None
    assert [[(k, v["logprob"]) for k, v in one.items()] for one in others] == [
        [("65", logprob(65))],
        [("66", logprob(66))],
    ]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    (part,) = choices(chunks(streamed.text), 0)
    assert (part["token_ids"], part["finish_reason"]) == ([], "length")


@in_loop
async def test_sampling_params_reach_the_engine():
    async with serving("H") as server:
        response = await ask(
            server, {"seed": 5, "temperature": 1.5, "min_tokens": 1, "detokenize": False}
        )
        assert response.status_code == 200
        await ask(server, cache_salt="x")
        first, second = server.engine.requests
    assert (first.sampling.seed, first.sampling.temperature) == (5, 1.5)
    assert (first.sampling.min_new_tokens, first.sampling.max_new_tokens) == (1, 16)
    assert second.cache_salt == "x"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": {"extra_args": {}}}, "sampling_params.extra_args"),
        ({"sampling": {"max_tokens": -1}}, "sampling_params.max_tokens"),
        ({"sampling": {"what": 1}}, "sampling_params.what"),
        ({"features": {}}, "features"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "ab"}, "token_ids"),
        ({"token_ids": [5] * 1024}, "token_ids"),
        ({"token_ids": [True]}, "token_ids[0]"),
        ({"sampling": {"prompt_logprobs": 1}, "stream": True}, "prompt_logprobs"),
        ({"model": "other"}, "model"),
    ],
)
@in_loop
async def test_what_cannot_be_is_refused_by_its_field(fields, param):
    async with serving("H") as server:
        response = await ask(server, **fields)
        assert response.status_code == (404 if param == "model" else 400)
        assert response.json()["error"]["param"] == param
        assert not server.engine.requests
