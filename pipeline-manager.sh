#!/usr/bin/env bash
# The one command of the platform: finds Python, makes the environment on first use, then hands over to the
# command line in clinical_orchestration/stack/cli.py. `--help` lists what it can do.
#
# CLINICAL_PYTHON  a Python 3.11, 3.12 or 3.13 to use instead of the first one found
# CLINICAL_VENV    folder of the environment instead of .venv in the checkout
set -u

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # followed by hand: `readlink -f` is not everywhere
  target=$(readlink -- "$self")
  case $target in /*) self=$target ;; *) self=$(dirname -- "$self")/$target ;; esac
done
root=$(cd -- "$(dirname -- "$self")" && pwd -P) || exit 1
venv=${CLINICAL_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
bootstrap=$root/clinical_orchestration/stack/bootstrap.py

# Settings of the caller's Python that would change ours: other modules, or no compiled bytecode (three times slower)
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX PYTHONSAFEPATH VIRTUAL_ENV
export PYTHONNOUSERSITE=1

suits() { # is $1 a Python this project runs on, with the modules that a minimal build may lack?
  "$1" -I -S -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14); import ctypes, fcntl, sqlite3, ssl, zlib' \
    >/dev/null 2>&1
}

if ! "$venv/bin/python" -I -S "$bootstrap" --root "$root" --venv "$venv" --check 2>/dev/null; then
  python=
  if [ -n "${CLINICAL_PYTHON:-}" ]; then
    if ! suits "$CLINICAL_PYTHON"; then
      printf 'error: CLINICAL_PYTHON=%s does not work here\n  why:  it must be a Python 3.11, 3.12 or 3.13 with ssl, sqlite3 and zlib\n  cure: set it to such a program, or unset it to let one be found\n' "$CLINICAL_PYTHON" >&2
      exit 1
    fi
    python=$CLINICAL_PYTHON
  else
    for candidate in python3 python3.11 python3.12 python3.13 \
      /usr/local/bin/python3.1{1,2,3} /usr/bin/python3.1{1,2,3} /opt/homebrew/bin/python3.1{1,2,3}; do
      if suits "$candidate"; then
        python=$candidate
        break
      fi
    done
  fi
  if [ -z "$python" ]; then
    printf 'error: no Python 3.11, 3.12 or 3.13 was found\n  why:  looked for python3, python3.11, python3.12 and python3.13 on PATH and in the usual folders (found: %s)\n  cure: install one (Debian, Ubuntu: apt install python3; macOS: brew install python@3.12), or name it in CLINICAL_PYTHON\n' \
      "$(python3 --version 2>/dev/null || echo none)" >&2
    exit 1
  fi
  "$python" -I -S "$bootstrap" --root "$root" --venv "$venv" || exit $?
fi

export CLINICAL_CHECKOUT=$root
exec "$venv/bin/python" -m clinical_orchestration.cli.main "$@"
