# SPDX-License-Identifier: Apache-2.0
"""Runs the same prompt on several meshes and compares logits and tokens with one device's."""

import numpy as np

from meshwen import Qwen2ForCausalLM, make_mesh

MESHES = ("8x4", "2x4", "1x8", "3", "1")  # The largest first: it sets how many devices there are.
QUESTION = "Maya buys 4 books at $7 each and pays with $50. How much change does she get?"

results = {}
for mesh in MESHES:
    model = Qwen2ForCausalLM.from_pretrained("demo", mesh=make_mesh(mesh), dtype="float32")
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    logits = np.asarray(model(np.array([prompt])))
    results[mesh] = logits, model.generate(prompt, temperature=0)[0].tokens

reference, tokens = results["1"]
for mesh, (logits, found) in results.items():
    difference = np.abs(logits - reference).max()
    print(f"{mesh:>4}: largest logit difference {difference:.1e}, same tokens: {found == tokens}")
