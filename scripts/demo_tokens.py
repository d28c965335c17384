# SPDX-License-Identifier: Apache-2.0
"""The demo model's greedy tokens: what a CPU gives, and whether this machine gives the same.

python scripts/demo_tokens.py --write    # in float32, on a CPU
python scripts/demo_tokens.py            # exit status 1 where an answer differs
"""

import json
import sys
from pathlib import Path

import jax

from meshwen import Qwen2ForCausalLM, demo

STORED = Path(__file__).parent.parent / "tests" / "data" / "demo_tokens.json"
QUESTIONS = 32


def answers(mesh: str = "1") -> list[list[int]]:
    """The tokens after each of the first held-out questions."""
    lines = (demo.path() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    model = Qwen2ForCausalLM.from_pretrained("demo", mesh=mesh, dtype="float32")
    assert model.tokenizer is not None
    prompts = [
        model.tokenizer.encode_chat([{"role": "user", "content": json.loads(line)["question"]}])
        for line in lines
    ]
    completions = model.generate(prompts, temperature=0, max_new_tokens=96)
    return [list(completion.tokens) for completion in completions]


def main() -> None:
    found = answers()
    if "--write" in sys.argv[1:]:
        lines = ",\n".join(json.dumps(tokens) for tokens in found)
        STORED.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    same = sum(a == b for a, b in zip(found, stored, strict=True))
    print(f"demo on {jax.devices()[0].device_kind}: {same} of {len(stored)} answers as on a CPU")
    sys.exit(same != len(stored))


if __name__ == "__main__":
    main()
