# SPDX-License-Identifier: Apache-2.0
"""A server over the demo model: its bits are those of the Python API, whoever else asks."""

import asyncio
import json
import random
from contextlib import asynccontextmanager
from functools import cache, wraps
from itertools import chain

import httpx
import pytest

from meshwen import AutoModelForCausalLM
from meshwen.server.app import create_app
from meshwen.server.engine_thread import EngineThread
from meshwen.server.options import ServerOptions
from meshwen.server.serving import Serving
from openai_streams import choices, chunks, without_id
from serving import PATIENCE

pytestmark = [pytest.mark.usefixtures("optimised"), pytest.mark.slow]

PROMPT = "Tom has 3 apples"
# One set for all tests: few programs are compiled.
SAMPLING = {"temperature": 1.0, "logprobs": 2}
COMPILING = 600.0  # seconds


@cache
def model():
    """The demo model in exact numerics."""
    limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return AutoModelForCausalLM.from_pretrained("demo", numerics="exact", **limits)


def in_loop(test):
    """Makes a test of a coroutine function; it fails when it hangs."""

    @wraps(test)
    def run(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), COMPILING))

    return run


@asynccontextmanager
async def server():
    """A client of a server over the model."""
    thread = EngineThread(model().engine, 1024, 4)
    thread.start()
    shared = Serving(
        engine=thread,
        tokenizer=model().tokenizer,
        config=model().config,
        max_model_len=model().engine.max_model_len,
        generation_config=model().generation_config,
        names=("demo",),
        fingerprint="fp_test",
        options=ServerOptions(),
        created=0,
    )
    transport = httpx.ASGITransport(create_app(shared), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=COMPILING
        ) as client:
            yield client
    finally:
        await asyncio.wait_for(thread.close(), PATIENCE)


async def ask(client, path, **body):
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return chunks(response.text) if body.get("stream") else response.json()


@in_loop
async def test_answers_have_the_tokens_and_the_bits_of_the_python_api():
    drawn = {"temperature": 1.0, "seed": 7, "n": 2, "max_new_tokens": 12}
    expected = model().generate(PROMPT, **drawn, logprobs=True, top_logprobs=2)
    fields = {**SAMPLING, "seed": 7, "n": 2, "max_tokens": 12, "return_token_ids": True}
    async with server() as client:
        whole = await ask(client, "/v1/completions", prompt=PROMPT, **fields)
        found = await ask(client, "/v1/completions", prompt=PROMPT, stream=True, **fields)
    assert expected[0].tokens != expected[1].tokens
    for choice, one in zip(whole["choices"], expected, strict=True):
        parts = choices(found, choice["index"])
        lists = (part["logprobs"]["token_logprobs"] for part in parts if part["logprobs"])
        assert choice["token_ids"] == list(one.tokens)
        assert choice["text"] == "".join(part["text"] for part in parts) == one.text
        assert choice["logprobs"]["token_logprobs"] == list(one.logprobs) == [*chain(*lists)]
        likeliest = [max(top.values()) for top in choice["logprobs"]["top_logprobs"]]
        assert likeliest == [top[0][1] for top in one.top_logprobs]


@in_loop
async def test_scoring_an_answer_gives_the_bits_that_decoding_gave():
    fields = {**SAMPLING, "seed": 3, "max_tokens": 10, "return_token_ids": True}
    async with server() as client:
        (choice,) = (await ask(client, "/v1/completions", prompt=PROMPT, **fields))["choices"]
        answer = choice["token_ids"]
        whole = choice["prompt_token_ids"] + answer
        scored = await ask(
            client,
            "/inference/v1/generate",
            token_ids=whole,
            sampling_params={**SAMPLING, "max_tokens": 0, "prompt_logprobs": 2},
        )
        echoed = await ask(
            client, "/v1/completions", prompt=[whole], echo=True, max_tokens=1, **SAMPLING
        )
    decoded = choice["logprobs"]
    found = scored["prompt_logprobs"][-len(answer) :]
    values = [one[str(token)]["logprob"] for one, token in zip(found, answer, strict=True)]
    assert values == decoded["token_logprobs"]
    again = echoed["choices"][0]["logprobs"]
    assert again["token_logprobs"][-len(answer) - 1 : -1] == decoded["token_logprobs"]
    assert again["top_logprobs"][-len(answer) - 1 : -1] == decoded["top_logprobs"]


@in_loop
async def test_the_same_request_gets_the_same_bytes_alone_and_among_others():
    bodies = [
        {"prompt": PROMPT[: 6 + i], "seed": i, "max_tokens": 4 + i, **SAMPLING} for i in range(6)
    ]
    async with server() as client:
        alone = [await ask(client, "/v1/completions", **body) for body in bodies]
        asked = [*range(6), *range(6)]
        random.Random(0).shuffle(asked)
        together = await asyncio.gather(
            *(ask(client, "/v1/completions", **bodies[i]) for i in asked)
        )
    for i, found in zip(asked, together, strict=True):
        assert json.dumps(without_id(found)) == json.dumps(without_id(alone[i]))
