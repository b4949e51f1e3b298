#!/usr/bin/env bash
# Runs everything that needs a GPU, in at most 8 minutes and unattended; see benchmarks/gpu.py for what it writes.
#
#   bash benchmarks/gpu.sh [--out FOLDER] [--minutes 8] [--only NAME ...]
#   bash benchmarks/gpu.sh --device cpu --quick      # the same lines without a GPU
#
# PYTHON names the interpreter; by default that of .venv where there is one, else python3. The project need not be
# installed in it: the checkout is put on its path.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD:$PWD/sharding:$PWD/launch${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $PYTHON is no Python 3.11 or newer; set PYTHON to one with PyTorch" >&2
  exit 2
fi
for module in torch rich jinja2 yaml; do
  if ! "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)"; then
    echo "error: $PYTHON has no $module; install the project with pip install -e '.[cuda13,dev]'" >&2
    exit 2
  fi
done

exec "$PYTHON" -m benchmarks.gpu "$@"
