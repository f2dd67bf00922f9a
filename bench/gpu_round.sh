#!/usr/bin/env bash
# The round on a GPU: tests, then benches, each part under nine minutes and by itself.
#
#     bash bench/gpu_round.sh                  all parts that have no result yet
#     bash bench/gpu_round.sh heads-bf16 train  these parts, again
#     ROUND_OUT=DIR bash bench/gpu_round.sh     results under DIR/<gpu> instead of bench/results/<gpu>
#     NF_COMMIT=... names the commit where there is no git; LIMIT=... are the seconds a part may take, TOTAL=... all parts
#
# Needs python3 with torch, triton, pytest and the package's dependencies, and a C++ compiler; installs nothing and uses
# no network. A part that fails leaves its log and does not stop the others; the exit code is the number of failed parts.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530} # seconds a part
TOTAL=${TOTAL:-99999} # seconds after which no part is started, and the one under way ends
# Benches and tests start programs of their own, which must find the package, too; a part that is cut off keeps its output.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# One part compiles for the next.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/nf-triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/nf-inductor}

gpu=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))' 2>/dev/null) || {
    echo "no CUDA device that torch can use: nothing to do" >&2
    exit 69
}
results=${ROUND_OUT:-bench/results}/$gpu
mkdir -p "$results"
# What a copy of the tree may have lost: the link to the kernels, and the compiled module.
[ -e nf_engine/kernels ] || ln -s ../kernels nf_engine/kernels
built() { $PYTHON -c 'from nf_engine import _cache; _cache.build_info()' 2>/dev/null; } # its stubs alone import as well
built || $PYTHON setup.py build_ext --inplace >"$results/build.log" 2>&1
built || { tail -n 20 "$results/build.log"; echo "the C++ module does not build: $results/build.log" >&2; exit 70; }

bench() { $PYTHON -m "bench.bench_$1" --json "$results/$2.json" "${@:3}"; }
workers() { $PYTHON -c 'import xdist' 2>/dev/null && echo "-n 8"; } # most of these tests is compiling
tests() { $PYTHON -m pytest -q -m gpu -p no:cacheprovider --durations=10 "$@"; }
small='ignored or inside or spoils or passes_through' # cases that are quick under a checker

declare -A run=(
    [machine]="machine"
    [tests]="tests tests/test_gpu.py -k 'not cannot_be_recorded'"
    [tests-broken]="tests tests/test_gpu.py -k cannot_be_recorded" # torch before 2.13 may leave the process unfit for more
    [tests-heads]="tests $(workers) tests/test_gpu_heads.py -k 'not real'"
    [tests-heads-real]="tests $(workers) tests/test_gpu_heads.py -k real"
    [memcheck]="checked memcheck '$small'"
    [racecheck]="checked racecheck '$small'"
    [heads-bf16]="bench heads heads --device cuda --resume --only 'bf16|fp32 tail' --candidates eager,compile,reference,fused"
    [heads-fp32]="bench heads heads --device cuda --resume --only 'fp32 (linear|deep)' --candidates eager,compile,reference,fused"
    [heads-autotune]="bench heads heads --device cuda --resume --only ' 4096 10 bf16 linear' --candidates eager,max-autotune"
    [heads-share]="bench heads heads --device cuda --add --only share"
    [overlap]="bench overlap overlap --quick"
    [cache]="bench cache cache"
    [recompute]="bench cache_vs_recompute cache_vs_recompute --quick"
    [train]="train"
    [memory]="bench memory memory --device cuda --width 1 --precision bf16-mixed"
    [memory-expandable]="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True bench memory memory_expandable --device cuda --width 1 --precision bf16-mixed"
    [lines-fp32]="bench lines lines_fp32 --device cuda"
    [lines-bf16]="bench lines lines_bf16 --device cuda --precision bf16-mixed"
    [step-fp32]="bench step step_fp32 --device cuda"
    [step-bf16]="bench step step_bf16 --device cuda --precision bf16-mixed"
    [highres]="bench highres highres --width 1 --budget 8GiB --step 64 --most 8192"
    [peers-vgg16]="peers vgg16-32-10 20000"
    [peers-resnet18]="peers resnet18-32-10 20000"
    [peers-vgg19]="peers vgg19-64-200 20000"
    [peers-large]="peers resnet18-224-100 5000"
)
order=(machine tests tests-broken tests-heads tests-heads-real step-bf16 step-fp32 heads-bf16 heads-fp32 train memory peers-vgg16 peers-resnet18
    memory-expandable lines-bf16 lines-fp32 heads-share overlap heads-autotune memcheck racecheck cache recompute highres peers-vgg19 peers-large)

# One part of the comparison with peers; generated images of as many samples as said. Call it again until nothing is left.
peers() {
    bench peers "peers_$1" --parts "$1" --data "synthetic:$2" --images "$2" --precision bf16-mixed --device cuda \
        --limit "$((LIMIT * 3 / 4))" --epochs 3 --budgets none,tight,0.33 \
        --only '^(none|tight|0.33) (back|acc|check|off|compiled (1$|0.1)|windows$|layerwise$|windows, (no cache|eager|reference))'
}

machine() {
    nvidia-smi || true
    $PYTHON -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|setuptools|pybind11|ninja|cmake|safetensors|pytest) ' || true
    $PYTHON -m nf_engine doctor
}

# Out-of-bounds accesses show only without torch's caching allocator, which hands out pieces of larger allocations.
checked() {
    command -v compute-sanitizer || { echo "compute-sanitizer is not here"; return 1; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all --error-exitcode 1 \
        "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu_heads.py -k "$2"
}

# Whole trainings inside a budget, their peaks against the plan.
train() {
    local bad=0
    for model in vgg16 resnet18; do
        for strategy in windows layerwise; do
            rm -rf "$results/run"
            $PYTHON -m nf_engine train --model $model --data synthetic:5000 --device cuda --memory-budget 1GiB --epochs 2 \
                --partition $strategy --augment crop-flip --output-dir "$results/run" || bad=1
        done
    done
    rm -rf "$results/run"
    return $bad
}

export -f bench tests machine checked train peers
export PYTHON results LIMIT
failed=0
for part in "${@:-${order[@]}}"; do
    [ -n "${run[$part]:-}" ] || { echo "unknown part $part; known: ${order[*]}" >&2; exit 2; }
    [ $# = 0 ] && [ -e "$results/$part.done" ] && continue
    left=$((TOTAL - SECONDS))
    [ $left -lt 30 ] && { echo "== no time for $part and what follows"; break; }
    rm -f "$results/$part.done"
    echo "== $part"
    started=$SECONDS
    timeout --kill-after=10 "$((left < LIMIT ? left : LIMIT))" bash -c "${run[$part]}" >"$results/$part.log" 2>&1
    code=$?
    tail -n 5 "$results/$part.log" | cut -c1-300
    echo "== $part: exit code $code after $((SECONDS - started)) s"
    if [ $code = 0 ]; then touch "$results/$part.done"; else failed=$((failed + 1)); fi
done
exit $failed
