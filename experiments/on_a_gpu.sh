#!/usr/bin/env bash
# Everything that is measured on a GPU, in three parts. Run one at a time: small trainings that share
# a GPU slow one another.
#
#     bash experiments/on_a_gpu.sh measure OUT        the benchmark, then python distill.py with its
#                                                     time: three to four minutes on an H200
#     bash experiments/on_a_gpu.sh cifar OUT CIFAR    CIFAR-10: a teacher, students of both kinds
#     bash experiments/on_a_gpu.sh shapes OUT         the long training of `shapes` from x0
#                                                     predictions, half of each batch on-policy
#
# CIFAR is a folder with train/<class>/*.jpg and test/<class>/*.jpg. Results are copied into OUT as
# soon as they are there: benchmark.json and profiles, the end of each program's output (*.log),
# result.json and samples.png of each training. A part that was stopped is continued.
#
# TINY=1 does the same in minutes on any machine, with sizes at which no result means anything.

set -u
case "${1:-} $#" in
    "measure 2" | "shapes 2" | "cifar 3") ;;
    *) echo "usage: bash experiments/on_a_gpu.sh measure OUT | shapes OUT | cifar OUT CIFAR" >&2
       exit 1 ;;
esac
part=$1 out=$(realpath -m "$2") cifar=$(realpath -m "${3:-.}") failed=0
cd "$(dirname "$0")/.." && mkdir -p "$out" runs/gpu

seconds=130 textures="" history_layers=12
teacher="--iterations 6000 --lr 8e-4 --ema-decay 0.999"
student="--iterations 1500 --lr 5e-4 --count 16384"
long="--iterations 20000 --batch 64 --count 20480"
if [ -n "${TINY:-}" ]; then
    seconds=1 history_layers=6
    teacher="--iterations 20 --size N/8 --batch 8"
    student="--iterations 5 --batch 8 --count 64"
    textures=$student
    long=$student
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
    local status=$?
    if [ $status -ne 0 ]; then failed=1; fi
    echo "exit status $status, $((SECONDS - began)) s: $*" >> "runs/gpu/$name.log"
    tail -n 40 "runs/gpu/$name.log" > "$out/$name.log"
}

measure() {
    logged benchmark python experiments/benchmark.py --seconds $seconds --out "$out"
    logged distill python distill.py $textures --out runs/gpu/textures
    keep textures runs/gpu/textures
}

cifar() {
    local run=runs/gpu/cifar10
    logged cifar10-teacher python teacher.py --preset cifar10 --data "$cifar/train" --size S/4 \
        --flip $teacher --out $run
    keep cifar10 $run
    logged cifar10-states python distill.py --preset cifar10 $student --out $run
    keep cifar10-states $run
    logged cifar10-x0 python distill.py --preset cifar10 $student --targets x0 --output state \
        --history-layers $history_layers --noise-shortcut --on-policy 1 \
        --teacher $run/teacher.pt --trajectories $run/trajectories --out $run-x0
    keep cifar10-x0 $run-x0
    logged cifar10-test python evaluate.py $run $run-x0 --test "$cifar/test" --out $run/test
    keep cifar10-test $run/test
}

shapes() {
    logged shapes python distill.py --preset shapes --targets x0 --output state \
        --history-layers 6 --on-policy 0.5 $long --out runs/gpu/shapes
    keep shapes runs/gpu/shapes
}

$part
exit $failed
