#!/usr/bin/env bash
# The whole pipeline on a laptop without a GPU: text -> tokenizer -> shards -> training with 1, 2
# and 3 passes, QAT and EMA -> int6 artifact -> reload -> sliding and test-time training scores.
#
#     bash scripts/demo.sh
#
# Time: under 5 minutes on 2 cores, once the packages are installed. The text is the prose of the
# installed Python itself (nothing is downloaded). It ends with a table of the run and with what
# lzma and a unigram model make of the same text. Settings: scripts/demo.env, or variables that are
# set already; arguments are flags of train_gpt.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_venv
install requirements.txt

if [ ! -f data/datasets/demo/manifest.json ]; then
  child python data/prepare_text.py --source python-docs --output data/datasets/demo --vocab-size 1024
fi
read_env scripts/demo.env
export RUN_ID="${RUN_ID:-demo_$(date +%Y%m%d_%H%M%S)}"
child python train_gpt.py "$@"
child python scripts/inspect_logs.py "${OUTPUT_DIR:-logs}/$RUN_ID.txt" --baselines
echo "What it writes:"
child python scripts/sample.py "${OUTPUT_DIR:-logs}/$RUN_ID.int6.xz" "The function returns" --tokens 80
echo "demo: $SECONDS seconds in all"
