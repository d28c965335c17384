#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Holds exact numerics on an emulated ARM processor against those on this x86 one: the kernels of every
# instruction set that either has, and what tests/digests.py is asked for.
# PYTHON (.venv/bin/python) must have the package, its kernels built from these sources.
#   scripts/arm_check.sh FOLDER [DIGESTS...]
#     FOLDER is kept, and spares the next run the emulated Python
#     DIGESTS: functions float32 bfloat16 int8, if none are named; also tokens
# Exit status 77: there is nothing here to make an emulated Python with.
set -euo pipefail
cd "$(dirname "$0")/.."

setup=../shared/arm/setup
[ -x "$setup" ] || { echo "SKIPPED: no $setup, which makes an emulated aarch64 Python"; exit 77; }
given=${PYTHON:-.venv/bin/python}
python=$(command -v "$given") || { echo "no Python: $given"; exit 1; }
python=$(realpath -s "$python")
folder=${1:?where to keep the emulated Python}
shift
[ $# -gt 0 ] || set -- functions float32 bfloat16 int8
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

# Programs compile for a minute or two each under the emulator, so two run at a time.
x86() { PYTHONPATH=src:tests "$python" "$@"; }
arm() { (cd "$tree" && PYTHONPATH=src:tests "$folder/emulated/python" "$@"); }
digests() { "$1" tests/digests.py "$2" >"$folder/$2.$1" 2>"$folder/$2.$1.log"; }
export -f x86 arm digests
export python tree folder
say "on ARM: $*"
printf '%s\n' "$@" | xargs -P 2 -I{} bash -c 'digests arm {} || { tail "$folder/{}.arm.log"; exit 255; }'
say "on x86: $*"
printf '%s\n' "$@" | xargs -I{} bash -c 'digests x86 {} || { tail "$folder/{}.x86.log"; exit 255; }'
for one in "$@"; do
    x86 tests/digests.py compare "$folder/$one.x86" "$folder/$one.arm"
done
say "the same bits"
