#!/usr/bin/env bash
# Everything that a GPU is needed for, in one go and within ten minutes: builds the operators for
# the GPU at hand, runs tests/gpu, has compute-sanitizer look at every kernel, and measures whole
# models of 2.6B parameters and the operators.
#
#     benchmarks/gpu.sh [PART ...]
#     OUT=/tmp/results PYTHON=.venv/bin/python benchmarks/gpu.sh model operators
#
# Parts are check, model, operators and quality, in this order; without any, all but quality, which
# trains the models of benchmarks/quality that a GPU is for, for as long as there is time, and goes on
# where it was when it is called again. The build is always there, and quick where it was done before.
#
# It wants an NVIDIA GPU, a CUDA build of torch (2.11 or later), nvcc and compute-sanitizer of the
# CUDA toolkit, and a C++ compiler. What it runs goes on after a step that failed; at the end stands
# a table of the steps, and the exit status is 1 if any of them failed.
#
#   OUT      where results go; default: benchmarks/results/gpu. log.txt holds what all steps
#            printed, summary.txt the table, and there is one JSON file for each benchmark
#   PYTHON   the interpreter that has torch; default: python3. The package is installed into it, in
#            editable mode (PIP_BREAK_SYSTEM_PACKAGES=1 where it is the system's own)
#   WHEELS   a folder of wheels of packages that the interpreter lacks, for a machine without a
#            network; they are unpacked into a temporary folder. The build needs setuptools, wheel,
#            packaging and ninja; the tests pytest with pytest-timeout and pytest-xdist and what
#            these need; the test of a whole training step, which is skipped without them,
#            megatron-core and pydantic and what these need; the part model deepspeed, omegaconf
#            and rich and what these need besides; the part quality whatever the package needs, and
#            scipy
#   MAX_JOBS, TORCH_CUDA_ARCH_LIST    of the build; default: 16, and the GPU at hand
#   SECONDS_IN_ALL    default: 570. A step for which no time is left is said to be timed out
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

parts=${*:-check model operators}
for part in $parts; do
    case $part in
    check | model | operators | quality) ;;
    *)
        echo "gpu.sh: error: there is no part '$part'; parts are check, model, operators and quality" >&2
        exit 2
        ;;
    esac
done
has() { [[ " $parts " == *" $1 "* ]]; }

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/gpu}
in_all=${SECONDS_IN_ALL:-570}
export MAX_JOBS=${MAX_JOBS:-16}
log_bytes=1500000 # of one step: all of them together stay below 16 MiB

mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: >"$out/log.txt"
names=() outcomes=() took=()
SECONDS=0

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, and remembers how that went.
step() {
    local name=$1 limit=$2 status=0 began=$SECONDS left=$((in_all - SECONDS)) outcome
    shift 2
    printf '== %s\n' "$name"
    if ((left < limit)); then limit=$left; fi
    if ((limit < 3)); then
        echo "no time is left for it" >"$scratch/step.txt"
        status=124
    else
        timeout --kill-after=5 "$limit" "$@" >"$scratch/step.txt" 2>&1 || status=$?
    fi
    case $status in
    0) outcome=ok ;;
    124 | 137) outcome='timed out' ;;
    *) outcome="failed ($status)" ;;
    esac
    names+=("$name") outcomes+=("$outcome") took+=($((SECONDS - began)))
    {
        printf '\n== %s: %s after %d s\n$ %s\n' "$name" "$outcome" $((SECONDS - began)) "$*"
        if (($(wc -c <"$scratch/step.txt") > log_bytes)); then
            head -c $((log_bytes / 2)) "$scratch/step.txt"
            printf '\n[... cut ...]\n'
            tail -c $((log_bytes / 2)) "$scratch/step.txt"
        else
            cat "$scratch/step.txt"
        fi
    } >>"$out/log.txt"
    if [ "$outcome" != ok ]; then tail -n 25 "$scratch/step.txt"; fi
    printf '   %s after %d s\n' "$outcome" $((SECONDS - began))
}

summary() {
    local i failed=0
    printf '| step | outcome | seconds |\n|---|---|---|\n'
    for i in "${!names[@]}"; do
        printf '| %s | %s | %d |\n' "${names[i]}" "${outcomes[i]}" "${took[i]}"
        if [ "${outcomes[i]}" != ok ]; then failed=1; fi
    done
    return "$failed"
}

if [ "${WHEELS:-}" ]; then
    step wheels 60 "$python" -m pip install --no-index --no-deps --target "$scratch/packages" \
        "$WHEELS"/*.whl
    export PYTHONPATH="$scratch/packages${PYTHONPATH:+:$PYTHONPATH}"
    export PATH="$scratch/packages/bin:$PATH" # ninja
fi

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    if ! TORCH_CUDA_ARCH_LIST=$("$python" -c "$capability" 2>"$scratch/error.txt"); then
        tail -n 1 "$scratch/error.txt" >&2
        echo "gpu.sh: error: $python finds no GPU through torch; set PYTHON to one that does" >&2
        exit 1
    fi
    export TORCH_CUDA_ARCH_LIST
fi

step machine 60 bash -c "nvidia-smi; nvcc --version; '$python' --version
    '$python' -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'"
step build 180 "$python" -m pip install --no-build-isolation --no-deps --verbose -e .
tests=("$python" -m pytest -p no:cacheprovider -n 0)
# Without torch's cache of memory every operand is an allocation of its own, with an end to watch.
# memcheck and racecheck look at our kernels alone; initcheck has to see who else writes.
sanitize() {
    step "compute-sanitizer $1" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
        --tool "$1" --error-exitcode 9 --print-limit 20 "${@:3}" \
        "${tests[@]}" -q tests/gpu/test_kernels.py -k "$2"
}
if has check; then
    step tests 200 "${tests[@]}" -q -rfEsP --tb=short --durations=10 tests/gpu
    sanitize memcheck '(511 or 4096 or odd or begin) and not devices' --kernel-regex kns=matformer
    sanitize racecheck '(511 and teacher) or (4096 and tau)' --kernel-regex kns=matformer
    sanitize initcheck '511 or (odd and float32) or begin'
fi

measure() {
    local name=$1 limit=$2 output=$3
    shift 3
    step "benchmark $name" "$limit" "$python" -m "benchmarks.$1" "${@:2}" --output "$out/$output.json"
}
if has model; then
    for config in paper/2.6b llama/2.6b-1gpu; do
        measure "$config" 150 "universal_model_${config%%/*}" \
            universal_model "launch/configs/$config.yaml"
    done
fi
if has operators; then
    # What must be shown first: the largest cell, which naive may not fit; then what others reach.
    measure 'loss, large' 80 loss_large loss --device cuda --dtype bfloat16 \
        --ways ours liger_distillation naive floor --sizes 3072:262144 --tokens 8192 --kl both \
        --seconds 4
    measure kernels 60 kernels kernels --device cuda --seconds 0.7 --gemm-sizes 1024:4096 2048:8192
    measure loss 90 loss loss --device cuda --dtype bfloat16 \
        --ways naive ours reference linear_cross_entropy liger liger_distillation cce quack floor \
        --sizes 2048:32768 --tokens 2048 --kl both --seconds 4
    measure nested_ffn 50 nested_ffn nested_ffn --device cuda --dtype bfloat16 \
        --sizes 1024:4096 2048:8192 --rows 1024 4096 --seconds 2
fi
if has quality; then
    step quality 560 "$python" -m benchmarks.quality run gpu --jobs 1
    for size in 78m 180m; do
        if [ -d "benchmarks/results/quality/$size" ]; then
            mkdir -p "$out/quality"
            cp -r "benchmarks/results/quality/$size" "$out/quality/"
        fi
        for log in runs/quality/"$size"/*.log; do
            if [ -f "$log" ]; then
                tail -c 100000 "$log" >"$out/quality-$size-$(basename "$log")"
            fi
        done
    done
fi

status=0
summary >"$out/summary.txt" || status=$?
cat "$out/summary.txt"
echo "results in $out"
exit "$status"
