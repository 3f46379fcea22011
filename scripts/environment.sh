# Sourced by the other scripts: makes or reuses .venv in the repository's root and activates it.
# PYTHON names the interpreter to make it with; a finished .venv is installed again only when
# what it must hold changes.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or set PYTHON to its path" >&2
  return 1
}

if [ ! -f .venv/complete ]; then
  python_found=$(find_python)
  echo "making .venv with $("$python_found" --version)"
  "$python_found" -m venv --clear .venv
  touch .venv/complete
fi
source .venv/bin/activate

# install FILE: sees to it that what requirements file FILE lists is in .venv.
install() {
  local stamp=".venv/installed-$(echo "$1" | tr / -)"
  if ! cmp -s "$1" "$stamp"; then
    echo "installing $1 into .venv"
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cp "$1" "$stamp"
  fi
}
