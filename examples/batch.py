# SPDX-License-Identifier: Apache-2.0
"""Answers several questions of different lengths at once, greedily and by sampling."""

from meshwen import Qwen2ForCausalLM

QUESTIONS = [
    "Maya buys 4 books at $7 each and pays with $50. How much change does she get?",
    "There are 6 bowls with 7 marbles each and 4 loose marbles. How many marbles are there in all?",
]

model = Qwen2ForCausalLM.from_pretrained("demo", mesh="data=2,model=4")
prompts = [model.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
for name, sampling in (
    ("greedy", {"temperature": 0}),
    ("sampled", {"temperature": 0.8, "top_p": 0.95, "seed": 7, "logprobs": True}),
):
    print(f"== {name}")
    for question, answer in zip(QUESTIONS, model.generate(prompts, **sampling), strict=True):
        print(question)
        print(f"  {answer.text!r} ({answer.finish_reason}, {len(answer.tokens)} tokens)")
        if answer.logprobs:
            print(f"  log-probability {sum(answer.logprobs):.3f}")
