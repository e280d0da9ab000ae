#!/bin/sh
# What is measured on a CUDA card, in eight minutes at most: LLaVA-1.5-7B's geometry in training and in use, a profile of
# a training step, and the embedded model where `x2dfd fetch` was run. Each part has a limit of its own and writes as it
# goes; one that fails or is cut off does not keep the next from its turn.
#
#   sh benchmarks/gpu.sh            into build/gpu
#   sh benchmarks/gpu.sh --dry      the same commands on a toy geometry, on a CPU
#
# PYTHON names the interpreter. Without bitsandbytes (the extra `train`) the part of QLoRA is missing.
out=build/gpu
python=${PYTHON:-python}
failed=0

part() { # seconds, command...
    seconds=$1
    shift
    echo "== $*" >&2
    timeout "$seconds" "$python" -m "$@" >/dev/null || { failed=1; echo "== ended early: $*" >&2; }
}

if [ "${1:-}" = --dry ]; then
    part 480 finetune.gpu --tiny --out $out/gpu.json
    part 480 benchmarks.speed --geometry toy --only cpu --rounds 1 --questions 4 --out $out/speed_llava7b.json
else
    part 200 finetune.gpu --out $out/gpu.json
    part 130 benchmarks.speed --geometry llava-7b --rounds 3 --questions 30 --out $out/speed_llava7b.json
    part 150 benchmarks.speed --only cuda --rounds 2 --questions 30 --out $out/speed_cuda.json
fi
exit $failed
