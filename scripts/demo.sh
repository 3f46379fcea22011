#!/usr/bin/env bash
# The whole pipeline on a laptop without a GPU: text -> tokenizer -> shards -> training with 1, 2
# and 3 passes, QAT and EMA -> int6 artifact -> reload -> sliding and test-time training scores.
#
#     bash scripts/demo.sh
#
# Time: under 5 minutes on 2 cores, once the packages are installed. The text is the prose of the
# installed Python itself (nothing is downloaded). It ends with a table of the run and of what
# lzma and a unigram model make of the same text. Settings: scripts/demo.env.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
started=$(date +%s)

if [ ! -f data/datasets/demo/manifest.json ]; then
  python data/prepare_text.py --source python-docs --output data/datasets/demo --vocab-size 1024
fi
set -a
source scripts/demo.env
RUN_ID="${RUN_ID:-demo_$(date +%Y%m%d_%H%M%S)}"
set +a
python train_gpt.py "$@"
python scripts/demo_report.py "logs/$RUN_ID.txt"
echo "demo: $(($(date +%s) - started)) seconds in all"
