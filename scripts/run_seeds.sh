#!/usr/bin/env bash
# Trains the file that is submitted once for each seed, and keeps a log of each run.
#
#   bash scripts/run_seeds.sh                      seeds 1337 42 2025 on all GPUs, else on the CPU
#   bash scripts/run_seeds.sh --demo               the demo's small model and data (minutes, no GPU)
#   bash scripts/run_seeds.sh --seeds "1 2" --output logs/mine -- --matrix-lr 0.03
#
# Options:
#   --seeds "N N ..."   default "1337 42 2025"
#   --output DIR        default logs/seeds, in the repository's root: train_gpt.py as it ran, its
#                       settings, and for each seed train_seed<N>.log and train_seed<N>.int6.xz
#   --env FILE          KEY=value lines for variables that are not set yet
#   --demo              --env scripts/demo.env
#   --nproc N           processes; default: one for each GPU, one without
#   --self-extracting   run the compressed form of the script
#   --script FILE       run this file, minified before: where python-minifier is missing, or where
#                       Python is newer than that of those who shall run the record
#   -- FLAGS            flags of train_gpt.py
#
# The script is minified first, and that file is what runs. A seed whose log is in DIR is not run
# again, so the same command after an interruption goes on at the first missing seed: with the scores
# of what it exported, or from its last checkpoint, which a signal in training (ON_SIGNAL=checkpoint,
# the default here) or CHECKPOINT_SECONDS had it write, else from its start; what it had logged is
# then moved to DIR/interrupted. Other settings are environment variables.
# SIGTERM, SIGHUP and SIGINT end the run that was started. To outlive the terminal:
#   setsid nohup bash scripts/run_seeds.sh >seeds.txt 2>&1 &
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }

root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/scripts/environment.sh"
seeds="1337 42 2025" output=logs/seeds env_file="" nproc="" given="" minify_flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --seeds | --output | --env | --nproc | --script)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --seeds) seeds=$2 ;;
                --output) output=$2 ;;
                --env) env_file=$2 ;;
                --nproc) nproc=$2 ;;
                --script)
                    [ -f "$2" ] || fail "--script: $2 is no file"
                    given=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
                    ;;
            esac
            shift
            ;;
        --demo) env_file=$root/scripts/demo.env ;;
        --self-extracting) minify_flags=(--self-extracting) ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "unknown option $1: see --help (flags of train_gpt.py come after --)" ;;
    esac
    shift
done
for seed in $seeds; do
    [[ $seed =~ ^(0|[1-9][0-9]{0,17})$ ]] || fail "--seeds: '$seed' is no seed: write whole numbers"
done
[ -n "${seeds// /}" ] || fail "--seeds is empty: write at least one seed"
[[ -z $given || -z ${minify_flags[*]-} ]] || fail "give one of --script and --self-extracting"
[[ -z $nproc || $nproc =~ ^[1-9][0-9]*$ ]] || fail "--nproc: '$nproc' is no number of processes"

[ -z "$env_file" ] || read_env "$env_file"

cd "$root"
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
mkdir -p "$output"

# Two of these in one folder would mistake each other's running log for an interrupted one.
pid_file=$output/running.pid
if [ -e "$pid_file" ] && ps -p "$(cat "$pid_file")" -o args= | grep -q run_seeds; then
    fail "$output is in use by process $(cat "$pid_file"): wait for it, or choose another --output"
fi
echo $$ >"$pid_file"
child=""
trap 'rm -rf "$pid_file" "$output/new"' EXIT
# "wait" comes back at a signal, so the trap runs at once; the run ends before this script does. What
# comes second is passed on too: it ends a run that still exports and scores.
end() {
    trap 'kill "$child" 2>/dev/null || true' INT TERM HUP
    if [ -n "$child" ]; then
        kill "$child" 2>/dev/null || true
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    fi
    echo "stopped: the same command goes on at this seed, from its last checkpoint or its artifact if there is one" >&2
    exit "$1"
}
trap 'end 130' INT
trap 'end 143' TERM
trap 'end 129' HUP

script=$output/train_gpt.py new=$output/new/train_gpt.py
if [ -n "$given" ]; then
    mkdir -p "$output/new"
    cp "$given" "$new"
    echo "runs $(wc -c <"$new") bytes: $given"
else
    "$python" scripts/minify.py -o "$new" ${minify_flags[@]+"${minify_flags[@]}"}
fi
# begun: whether the folder has a run that this command would keep or go on with.
begun() {
    compgen -G "$output/train_seed*.log" || compgen -G "$output/running/*.int6.xz" ||
        compgen -G "$output/running/*/step_*.pt"
} >/dev/null
if begun && ! cmp -s "$new" "$script"; then
    fail "$output has runs of another train_gpt.py: choose another --output, or move them" \
        "and $output/running away"
fi
mv "$new" "$script"
rmdir "$output/new"

# What all seeds share: mistakes in it are told now, and finished seeds must have had the same. Of
# another --script only the flags are known.
settings="$*"
[ -n "$given" ] || settings=$("$python" - "$@" <<'PYTHON'
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports
sys.path.insert(0, ".")
import train_gpt
own = {"seed", "run_id", "output_dir", "resume"}  # chosen for each seed
try:
    env = os.environ | {"RESUME": "0", "RUN_ID": "any"}
    hp, sources = train_gpt.read_configuration(env, sys.argv[1:])
    given = {name: source for name, source in sources.items() if source != "default"}
    for name in own & given.keys():
        train_gpt.require(given[name] != "flag", f"{name} is set by run_seeds.sh: leave it out")
except train_gpt.UserError as error:
    sys.exit(f"error: {error}")
free = own | {"checkpoint_seconds", "on_signal"}
print("\n".join(f"{name}={getattr(hp, name)}" for name in given if name not in free))
PYTHON
) || exit 2
if begun && [ -e "$output/settings" ]; then
    [ "$settings" = "$(cat "$output/settings")" ] || fail "$output has runs of other settings:" \
        "$(diff "$output/settings" - <<<"$settings" | grep '^[<>]' | tr '\n' ' '): choose another --output"
fi
echo "$settings" >"$output/settings"

if [ -z "$nproc" ]; then
    count='import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch; print(max(1, torch.cuda.device_count()))'
    nproc=$("$python" -c "$count")
fi
launch=()
[ "$nproc" = 1 ] || launch=(-m torch.distributed.run --standalone --nproc_per_node="$nproc")
for seed in $seeds; do
    left=$output/train_seed$seed.int6.xz
    [ ! -e "$left" ] || [ -e "${left%.int6.xz}.log" ] ||
        fail "$left is there without its log: move it away, nothing is overwritten"
done
# finish RUN: keeps the log and the artifact of a run whose log is complete.
finish() {
    "$python" scripts/inspect_logs.py "$output/running/$1.txt" --require-complete >/dev/null &&
        mv "$output/running/$1.int6.xz" "$output/$1.int6.xz" &&
        rm -rf "$output/running/$1.checkpoints" &&
        mv "$output/running/$1.txt" "$output/$1.log" # last: the log says that the seed is done
}
for seed in $seeds; do
    run=train_seed$seed
    if [ -e "$output/$run.log" ]; then
        echo "seed $seed: finished before, kept $output/$run.log"
        continue
    fi
    if [ -e "$output/running/$run.int6.xz" ] && finish "$run" 2>/dev/null; then
        echo "seed $seed: finished by itself, kept $output/$run.log"
        continue
    fi
    # The trainer holds a lock on its log: one may have outlived a killed run_seeds.sh.
    if [ -e "$output/running/$run.txt" ] && command -v flock >/dev/null &&
        ! flock -n "$output/running/$run.txt" true; then
        fail "seed $seed: a process still writes $output/running/$run.txt: wait for its end"
    fi
    resume=0
    if compgen -G "$output/running/$run.checkpoints/step_*.pt" >/dev/null ||
        { [ -e "$output/running/$run.int6.xz" ] && ! tac "$output/running/$run.txt" | sed '/^stop /q' | grep -q '^evaluated '; }; then
        resume=1 # from its checkpoint, or with the scores of what it exported
    elif [ -e "$output/running/$run.txt" ]; then
        mkdir -p "$output/interrupted"
        kept=$output/interrupted/$run.$(date +%Y%m%d_%H%M%S).$$
        echo "seed $seed: starts anew, what an interrupted run left moves to $kept.*"
        for old in "$output/running/$run".*; do # the log, checkpoints, perhaps an artifact
            mv "$old" "$kept.${old##*.}"
        done
    fi
    echo "seed $seed: $nproc process(es), log $output/running/$run.txt"
    # In the background, so that a signal to this script reaches it at once; in a group of its own
    # (set -m), so that Ctrl-C does not reach the run a second time.
    set -m
    SEED=$seed RUN_ID=$run OUTPUT_DIR=$output/running RESUME=$resume \
        ON_SIGNAL=${ON_SIGNAL:-checkpoint} "$python" ${launch[@]+"${launch[@]}"} "$script" "$@" &
    child=$!
    set +m
    wait "$child" || {
        echo "error: seed $seed ended with code $?, see above; then the same command goes on" >&2
        exit 1
    }
    child=""
    finish "$run" || fail "seed $seed: its log is incomplete and stays in $output/running"
done
"$python" scripts/inspect_logs.py "$output"/train_seed*.log
