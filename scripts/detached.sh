#!/usr/bin/env bash
# Runs a command that outlives this shell, such as a long run on a machine at the end of a line that
# may drop, and follows it in pieces.
#
#   bash scripts/detached.sh start logs/job bash scripts/run_seeds.sh --output logs/seeds
#   bash scripts/detached.sh wait logs/job 300     prints what is new, for at most 300 s
#   bash scripts/detached.sh stop logs/job         SIGTERM to the command and all that it started
#
# DIR holds pid, output.txt and, in the end, exit_code. `wait` (without seconds: to the end) returns
# the command's exit code, 75 while it still runs, and 1 if it was killed. `start` returns at once,
# and refuses a DIR that was used.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }
fail() { echo "error: $*" >&2; exit 2; }
running() { kill -0 -- "-$(cat "$dir/pid")" 2>/dev/null; }

[ $# -ge 2 ] || { usage; exit 2; }
action=$1 dir=$2
shift 2
case $action in
    start)
        [ $# -gt 0 ] || fail "start: no command is given"
        [ ! -e "$dir/pid" ] || fail "$dir was used before: choose another folder"
        command -v setsid >/dev/null || fail "setsid is missing: install util-linux"
        mkdir -p "$dir"
        # shellcheck disable=SC2016  # the inner shell expands these
        setsid bash -c 'echo $$ >"$0/pid"; "$@"; echo $? >"$0/code"; mv "$0/code" "$0/exit_code"' \
            "$dir" "$@" >"$dir/output.txt" 2>&1 </dev/null &
        until [ -s "$dir/pid" ]; do sleep 0.1; done
        echo "started, process $(cat "$dir/pid"), output in $dir/output.txt"
        ;;
    wait)
        [ -s "$dir/pid" ] || fail "$dir: nothing was started there"
        limit=${1:-}
        [[ $limit =~ ^[0-9]*$ ]] || fail "wait: '$limit' is no number of seconds"
        since=$SECONDS shown=0
        [ ! -e "$dir/shown" ] || shown=$(cat "$dir/shown")
        while :; do
            ended=no
            { [ ! -e "$dir/exit_code" ] && running; } || ended=yes
            size=$(stat -c %s "$dir/output.txt") # what came before it ended is printed
            tail -c "+$((shown + 1))" "$dir/output.txt" | head -c "$((size - shown))"
            shown=$size
            echo "$shown" >"$dir/shown"
            [ $ended = no ] || break
            [ -z "$limit" ] || [ $((SECONDS - since)) -lt "$limit" ] || exit 75
            sleep 1
        done
        [ -e "$dir/exit_code" ] || { echo "error: the command was killed" >&2; exit 1; }
        exit "$(cat "$dir/exit_code")"
        ;;
    stop)
        [ -s "$dir/pid" ] || fail "$dir: nothing was started there"
        kill -- "-$(cat "$dir/pid")" 2>/dev/null || echo "it had ended before"
        ;;
    *) fail "unknown action $action: use start, wait or stop" ;;
esac
