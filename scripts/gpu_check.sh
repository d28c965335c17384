#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Right and fast on one GPU? Under 10 minutes on a card with room for 7B in bfloat16.
#
#     scripts/gpu_check.sh [FOLDER]
#
# Uses the machine's own Python and jax (PYTHON names another), which need this package's
# dependencies, but not the package. Writes what it finds to FOLDER (gpu-check): the demo model's
# answers against a CPU's, a benchmark of 7B with dummy weights, and the same of transformers where
# that is installed. Exit status 1: an answer differs, or a target is missed. MODEL, BATCH and
# PROMPTS name another size, and PLATFORM=cpu tries the script itself where there is no GPU.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-gpu-check}
model=${MODEL:-qwen2.5-7b}
batch=${BATCH:-1,8,64}
prompts=${PROMPTS:-512,4096}
export JAX_PLATFORMS="${PLATFORM:-cuda}"
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
mkdir -p "$folder"
status=0

"$python" -c 'import jax; print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")'

"$python" scripts/demo_tokens.py | tee "$folder/demo.txt"
grep --quiet '^demo on .*: \([0-9]*\) of \1 answers' "$folder/demo.txt" || status=1

"$python" -m meshwen bench --model "$model" --load-format dummy --dtype bfloat16 \
    --batch "$batch" --prompt-len "$prompts" --html "$folder/bench.html" --json >"$folder/bench.json"

if "$python" -c 'import torch, transformers' 2>/dev/null; then
    device=cuda
    [ "$JAX_PLATFORMS" = cpu ] && device=cpu
    "$python" benchmarks/engines/gpu_transformers.py --model "$model" --batch "$batch" \
        --prompt-len "$prompts" --device "$device" >"$folder/transformers.json"
else
    echo "transformers is not installed: no comparison" >&2
    rm -f "$folder/transformers.json"
fi

"$python" - "$folder" <<'PYTHON' || status=1
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
found = json.loads((folder / "bench.json").read_text())
machine = found["machine"]
print(f"{machine['bandwidth'] / 1e9:.0f} GB/s, {machine['rate'] / 1e12:.0f} TFLOP/s measured")
theirs = {}
if (folder / "transformers.json").exists():
    rows = json.loads((folder / "transformers.json").read_text())["rows"]
    theirs = {(r["phase"], r["batch"], r["length"]): r["seconds"] for r in rows}
missed = 0
for row in found["rows"]:
    key = row["phase"], row["batch"], row["length"]
    seconds = row["seconds"]["median"]
    target = {"prefill": 0.5, "decode": 0.75 if row["batch"] == 1 else 0}[row["phase"]]
    text = f"{key[0]:8} batch {key[1]:3}, {key[2]:5} tokens: {seconds * 1e3:9.2f} ms, {row['share']:.0%}"
    if target:
        text += f" of the card's limit (target {target:.0%})"
    if theirs.get(key):
        text += f"; transformers {theirs[key] / seconds:.2f} times as long (target 1)"
    bad = row["share"] < target or (theirs.get(key) or seconds) < seconds
    missed += bad
    print(text + (" MISSED" if bad else ""))
sys.exit(missed > 0)
PYTHON
exit "$status"
