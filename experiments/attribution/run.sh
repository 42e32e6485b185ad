#!/usr/bin/env bash
# The attribution study of one size of the controlled world: [JOBS=N] experiments/attribution/run.sh SIZE [SEEDS] [OUT]
# SIZE is a size of random models (0.3m, 1m, 3m, ...), SEEDS how many runs each arm has (10), OUT a folder
# (runs/attribution/SIZE). Complete runs are passed over, so the same command continues after any interruption.
# The base learns on an accelerator where there is one; its runs are short and go side by side on CPUs. JOBS above 1
# needs hydra-joblib-launcher.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv/bin ] && export PATH=$PWD/.venv/bin:$PATH
size=${1:?usage: experiments/attribution/run.sh SIZE [SEEDS] [OUT]}
out=${3:-runs/attribution/$size}
jobs=${JOBS:-1}
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR=$(realpath "$out")/.compiled # runs of one arm are compiled once
world="prompts=world prompts.limit=256 remat=none save_every=1000000 max_to_keep=1 model.name=$size"
[ -e "$out/base/manifest.json" ] || spinal train +arm=base $world seed=0 hydra.run.dir="$out/base"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} NPROC=$(( ($(nproc) + jobs - 1) / jobs ))
launcher=()
[ "$jobs" -gt 1 ] && launcher=(hydra/launcher=joblib hydra.launcher.n_jobs="$jobs")
spinal attribute experiment=attribution model.source="$out/base/model" $world eval_examples=256 \
  seed="range(0,${2:-10})" hydra.sweep.dir="$out" "${launcher[@]}"
