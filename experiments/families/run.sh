#!/usr/bin/env bash
# The families from checkpoints to table and figures: experiments/families/run.sh full PROMPTS PAIRS | standin
# Complete runs are passed over, so start it again after any interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PWD/.venv/bin:$PATH
case ${1:-} in
  full)
    sweep=runs/families
    spinal compare study=families prompts.path="$2" preferences.path="$3" "${@:4}"
    ;;
  standin)
    sweep=runs/families_standin/compared
    standins=runs/families_standin/models
    python experiments/families/standins.py "$standins"
    spinal compare study=families pair=phi-2,deepseek-llm-7b,gemma-2b,qwen2.5-7b,llama-3-8b hydra.sweep.dir="$sweep" \
      model.source="$standins/\${hydra:runtime.choices.pair}/aligned" model.dtype=float32 \
      reference.source="$standins/\${hydra:runtime.choices.pair}/base" reference.dtype=float32 \
      prompts=default prompts.limit=64 prompts.max_length=128 preferences=world preferences.limit=64 preferences.held_out=0
    ;;
  *) echo "usage: experiments/families/run.sh full PROMPTS.jsonl.gz PAIRS.jsonl.gz [SETTINGS] | standin" >&2; exit 2 ;;
esac
python experiments/families/analyse.py "$sweep" "experiments/families/$1"
