#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Holds exact numerics on an emulated ARM processor against those on this x86 one: the kernels of every
# instruction set that either has, what XLA computes beside them, and the demo model's logits, tokens
# and log-probabilities. PYTHON (.venv/bin/python) must have the package with its kernels.
#   scripts/arm_check.sh [FOLDER]     FOLDER is kept, and spares the next run the emulated Python
# Exit status 77: there is nothing here to make an emulated Python with.
set -euo pipefail
cd "$(dirname "$0")/.."

setup=../shared/arm/setup
[ -x "$setup" ] || { echo "SKIPPED: no $setup, which makes an emulated aarch64 Python"; exit 77; }
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
if [ $# -gt 0 ]; then
    folder=$1
else
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
fi
mkdir -p "$folder"
folder=$(realpath "$folder")
tree=$folder/tree kernels=src/meshwen/ops/cpu/kernels
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
install() { "$python" -m pip install --quiet --disable-pip-version-check --target "$@"; }

if [ ! -x "$folder/emulated/python" ]; then
    say "making an emulated aarch64 Python"
    jax=$("$python" -c 'from importlib.metadata import version; print(version("jax"))')
    "$setup" "$folder/emulated" "$jax" >"$folder/setup.log" 2>&1 || { tail "$folder/setup.log"; exit 1; }
    install "$folder/emulated/site" --no-deps jaxtyping wadler-lindig prompt_toolkit wcwidth
    install "$folder/compiler" 'ziglang>=0.17,<0.18'
fi
say "building the kernels for aarch64"
rm -rf "$tree"
mkdir "$tree"
cp -r src tests "$tree"
zig() { PYTHONPATH="$folder/compiler" "$python" "$@"; }
zig scripts/build_kernels.py linux-aarch64 --out "$tree/$kernels" >/dev/null

# The kernels' own bits: no Python is emulated for them.
headers=$("$python" -c 'import jax.ffi; print(jax.ffi.include_dir())')
for target in x86_64 aarch64; do
    library=$kernels/libkernels.so
    [ $target = x86_64 ] || library=$tree/$library
    zig -m ziglang cc -target $target-linux-gnu -std=gnu11 -O1 -fno-sanitize=all "-I$headers" \
        tests/kernels/{digests,xla,guarded}.c "$(realpath "$library")" -lm -lpthread \
        -o "$folder/digests-$target"
done
"$folder/digests-x86_64" >"$folder/kernels"
qemu-aarch64-static -L "$folder/emulated/root" "$folder/digests-aarch64" >>"$folder/kernels"
say "kernels of: $(cut -d' ' -f1 "$folder/kernels" | sort -u | paste -sd' ')"
if cut -d' ' -f2- "$folder/kernels" | sort -u | cut -d' ' -f1-3 | uniq -d | grep .; then
    echo "these differ"
    cat "$folder/kernels"
    exit 1
fi

x86() { PYTHONPATH=src:tests "$python" "$@"; }
arm() { (cd "$tree" && PYTHONPATH=src:tests "$folder/emulated/python" "$@"); }
# Run with both at once, for `NAME.x86` and `NAME.arm`.
both() {
    local name=$1
    shift
    x86 "$@" >"$folder/$name.x86" 2>"$folder/$name.x86.log" &
    local other=$!
    arm "$@" >"$folder/$name.arm" 2>"$folder/$name.arm.log" || { tail "$folder/$name.arm.log"; exit 1; }
    wait $other || { tail "$folder/$name.x86.log"; exit 1; }
}

say "what XLA computes"
both functions tests/digests.py
x86 tests/digests.py compare "$folder/functions.x86" "$folder/functions.arm"

# Sampled, so that tokens hang on every bit; with log-probabilities.
for precision in "--dtype float32" "--dtype bfloat16" "--dtype float32 --quantization int8"; do
    for mesh in 1x1 1x8; do
        say "the demo model's tokens and log-probabilities, $precision, $mesh"
        # shellcheck disable=SC2086
        both answer -m meshwen generate "What is 3+4?" --model demo --numerics exact $precision \
            --mesh $mesh --temperature 0.8 --seed 5 --max-new-tokens 16 --logprobs --json
        for one in x86 arm; do
            sed 's/"timings": {[^}]*}//' "$folder/answer.$one" >"$folder/answer.$one.cut"
        done
        cmp "$folder/answer.x86.cut" "$folder/answer.arm.cut"
    done
done

# Logits: this processor's certificate, and the same tokens again on the other.
certificate=$folder/certificate.json
say "the demo model's logits"
x86 -m meshwen verify --model demo --meshes 1x1 --numerics exact --max-new-tokens 4 --json "$certificate"
arm -m meshwen verify --model demo --against "$certificate"
say "the same bits"
