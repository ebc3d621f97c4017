#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call of about nine minutes:
#
#     bash experiments/on_a_gpu.sh OUT CIFAR
#
# CIFAR is a folder with train/<class>/*.jpg and test/<class>/*.jpg. Results are copied into OUT as
# soon as they are there: benchmark.json, the end of each program's output (*.log), result.json and
# samples.png of each training.
#
#     1. the benchmark, alone on the GPU
#     2. python distill.py from start to end, alone, with its time
#     3. at once: CIFAR-10 (a teacher, students of both kinds), and the long training of `shapes`
#        from x0 predictions, half of each batch on-policy
#
# TINY=1 does the same in two minutes on any machine, with sizes at which no result means anything.

set -u
out=$(realpath -m "$1") cifar=$(realpath "$2")
cd "$(dirname "$0")/.." && mkdir -p "$out" runs/gpu

seconds=130 teacher="--iterations 10000" student="--iterations 2500"
long="--iterations 50000 --count 100000 --batch 64"
if [ -n "${TINY:-}" ]; then
    seconds=1
    teacher="--iterations 20 --size N/8 --batch 8"
    student="--iterations 5 --batch 8 --count 64"
    long="--iterations 20 --count 64 --batch 8"
fi

keep() {  # keep NAME FOLDER: what a training in a folder has written
    for file in result.json samples.png teacher.png evaluation.json; do
        if [ -f "$2/$file" ]; then cp "$2/$file" "$out/$1-$file"; fi
    done
}

logged() {  # logged NAME COMMAND…: run it, and keep the end of what it says, and its time
    local name=$1 began=$SECONDS
    shift
    "$@" > "runs/gpu/$name.log" 2>&1
    echo "exit status $?, $((SECONDS - began)) s: $*" >> "runs/gpu/$name.log"
    tail -n 40 "runs/gpu/$name.log" > "$out/$name.log"
}

logged benchmark python experiments/benchmark.py --seconds $seconds --out "$out"

logged distill python distill.py ${TINY:+$student} --out runs/gpu/textures
keep textures runs/gpu/textures

cifar() {
    local run=runs/gpu/cifar10
    logged cifar10-teacher python teacher.py --preset cifar10 --data "$cifar/train" --size S/4 \
        --flip --compile $teacher --out $run
    keep cifar10 $run
    logged cifar10-states python distill.py --preset cifar10 $student --out $run
    keep cifar10-states $run
    logged cifar10-x0 python distill.py --preset cifar10 $student --targets x0 --output state \
        --history-layers 12 --noise-shortcut --on-policy 1 --teacher $run/teacher.pt --out $run-x0
    keep cifar10-x0 $run-x0
    logged cifar10-test python evaluate.py $run $run-x0 --test "$cifar/test" --out $run/test
    keep cifar10-test $run/test
}

cifar &
logged shapes python distill.py --preset shapes --targets x0 --output state --history-layers 6 \
    --on-policy 0.5 $long --out runs/gpu/shapes &
wait
keep shapes runs/gpu/shapes
