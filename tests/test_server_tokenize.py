# SPDX-License-Identifier: Apache-2.0
"""A text's token ids and back, over HTTP; expected is what the `tokenizers` library says."""

import pytest
import tokenizers

from meshwen import demo
from serving import MAX_MODEL_LEN, in_loop, serving

TEXT = "What is 3+4? \U0001f384<|im_end|>"
LIBRARY = tokenizers.Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
IDS = LIBRARY.encode(TEXT).ids


@in_loop
async def test_texts_and_conversations_are_tokenised():
    async with serving() as server:

        async def ask(**body):
            return (await server.client.post("/tokenize", json=body)).json()

        found = await ask(prompt=TEXT, model="demo")
        assert found == {
            "count": len(IDS),
            "max_model_len": MAX_MODEL_LEN,
            "tokens": IDS,
            "token_strs": None,
        }
        found = await ask(prompt=TEXT, add_special_tokens=False, return_token_strs=True)
        assert found["token_strs"] == [LIBRARY.id_to_token(one) for one in IDS]
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        asked = await ask(messages=messages[:1])
        begun = LIBRARY.decode(asked["tokens"], skip_special_tokens=False)
        assert begun.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
        refused = await ask(messages=messages, tools=[tool])  # By the demo's template.
        assert "tool" in refused["error"]["message"]
        closed = await ask(messages=messages, add_generation_prompt=False)
        assert closed["tokens"][: asked["count"]] == asked["tokens"]
        going_on = {"add_generation_prompt": False, "continue_final_message": True}
        continued = await ask(messages=messages, **going_on)
        assert LIBRARY.decode(continued["tokens"], skip_special_tokens=False).endswith("Yes")
        long = await ask(prompt="word " * 2 * MAX_MODEL_LEN)
        assert long["count"] > MAX_MODEL_LEN


@in_loop
async def test_token_ids_become_their_text():
    async with serving() as server:
        found = await server.client.post("/detokenize", json={"tokens": IDS})
        assert found.json() == {"prompt": TEXT}
        assert (await server.client.post("/detokenize", json={"tokens": []})).json() == {
            "prompt": ""
        }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "frob": 1}, "frob"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
@in_loop
async def test_what_cannot_be_tokenised_is_refused_by_name(path, body, param):
    async with serving() as server:
        found = await server.client.post(path, json=body)
        assert (found.status_code, found.json()["error"]["param"]) == (400, param)
        other = await server.client.post(path, json={"prompt": "x", "tokens": [1], "model": "gpt"})
        assert other.status_code in (400, 404)


@in_loop
async def test_a_model_without_a_tokenizer_says_so():
    async with serving(with_tokenizer=False) as server:
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            found = await server.client.post(path, json=body)
            assert found.status_code == 400
            assert "no tokenizer" in found.json()["error"]["message"]
