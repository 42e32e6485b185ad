#!/usr/bin/env bash
# The attribution study of one size: [JOBS=N] experiments/attribution/run.sh SIZE [SEEDS] [OUT]
# SIZE is a size of random models (0.3m, 1m, 3m, ...), SEEDS how many runs each arm has (10), OUT a folder
# (runs/attribution/SIZE). Needs no network. Complete runs are passed over and one that was cut off goes on, so the same
# command continues after any interruption. What the analysis needs is packed into OUT/study.tar.gz at the end.
# BASE="steps=20" and the like are more settings of the base, to try the script itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv/bin ] && export PATH=$PWD/.venv/bin:$PATH
size=${1:?usage: experiments/attribution/run.sh SIZE [SEEDS] [OUT]}
seeds=${2:-10}
out=${3:-runs/attribution/$size}
jobs=${JOBS:-$(nproc)}
export NPROC=$(( ($(nproc) + jobs - 1) / jobs ))        # threads of XLA in each process
export JAX_COMPILATION_CACHE_DIR=$(realpath -m "$out")/.compiled # runs of one arm are compiled once
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
mkdir -p "$out/logs"
common="prompts=world prompts.limit=256 remat=none save_every=1000000 max_to_keep=1"

one() { # name, settings...
  local name=$1
  shift
  [ -e "$out/$name/manifest.json" ] || spinal train "$@" hydra.run.dir="$out/$name" > "$out/logs/$name.txt" 2>&1 ||
    { echo "$name failed:" >&2; tail -3 "$out/logs/$name.txt" >&2; return 255; }
  echo "$name done after $SECONDS s"
}
export -f one
export out

# The base takes up to 2,000 steps one after the other, on an accelerator where there is one. The other runs are short
# and side by side, on CPUs, which models of these sizes do not fill.
NPROC=$(nproc) one base +arm=base $common model.name="$size" seed=0 ${BASE:-}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
runs=$(for seed in $(seq 0 $((seeds - 1))); do for arm in dpo shuffled sft; do
  echo "$arm-$seed +arm=$arm $common trace_every=1000000 eval_examples=256 model.source=$out/base/model model.name=$size seed=$seed"
done; done)
echo "$runs" | head -3 | xargs -P "$jobs" -I{} bash -c 'one {}' # one run of each arm first fills the cache of compiled programs
echo "$runs" | tail -n +4 | xargs -P "$jobs" -r -I{} bash -c 'one {}'
tar -czf "$out/study.tar.gz" -C "$out" --exclude=model --exclude=checkpoints --exclude=.compiled --exclude='events.*' \
  --exclude=figures --exclude=report.html --exclude=study.tar.gz .
echo "$out/study.tar.gz: $(du -h "$out/study.tar.gz" | cut -f1), $SECONDS s"
