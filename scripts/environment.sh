# Sourced by the other scripts: functions that make .venv and read files of settings.

fail() { echo "error: $*" >&2; exit 2; }

# use_venv: makes or reuses .venv in the current folder and activates it. PYTHON names the
# interpreter to make it with.
use_venv() {
  if [ ! -f .venv/complete ]; then
    local candidate found=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        2>/dev/null && found=$candidate && break
    done
    [ -n "$found" ] || fail "${PYTHON:+$PYTHON is not one: }a Python 3.11 to 3.13 is needed:" \
      "install one, or set PYTHON to its path"
    echo "making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
    touch .venv/complete
  fi
  source .venv/bin/activate
}

# install FILE: installs what requirements file FILE lists, unless that is in .venv already.
install() {
  local stamp=.venv/installed-${1//\//-}
  if ! cmp -s "$1" "$stamp"; then
    echo "installing $1 into .venv"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cp "$1" "$stamp"
  fi
}

# read_env FILE: exports the variables of its KEY=value lines that are not set yet. Line ends may
# be LF or CRLF; quotes around a value are dropped; lines that begin with # are comments.
read_env() {
  [ -f "$1" ] || fail "$1 is missing: name a file of KEY=value lines"
  local line name value
  while IFS= read -r line || [ -n "$line" ]; do
    line=${line%$'\r'} line=${line#$'\xef\xbb\xbf'}
    line=${line#export }
    [[ -n ${line//[[:space:]]/} && $line != \#* ]] || continue
    [[ $line =~ ^[A-Z][A-Z0-9_]*= ]] || fail "$1 has a line that is no NAME=VALUE: $line"
    name=${line%%=*} value=${line#*=}
    value=${value#[\"\']} value=${value%[\"\']}
    [ -n "${!name+set}" ] || export "$name=$value"
  done <"$1"
}

# child COMMAND...: runs it so that a signal to this script reaches it at once; the script then ends
# with the command's exit code.
child() {
  "$@" &
  local pid=$! code=0
  trap 'kill -TERM $pid 2>/dev/null || true' INT TERM HUP
  until wait "$pid"; code=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
  trap - INT TERM HUP
  [ "$code" -eq 0 ] || exit "$code"
}
