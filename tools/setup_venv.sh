#!/usr/bin/env bash
# Make or refresh a virtual environment with specrl in it (editable).
# usage: [PYTHON=python3] [CONSTRAINTS=constraints.txt] tools/setup_venv.sh VENV [EXTRAS]
#
# Where nvidia-smi finds no GPU, torch comes from its CPU index, which is ten times smaller; where that index
# cannot be reached, from the default one. CONSTRAINTS= (empty) leaves the versions to the resolver.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extras=${2:-}
python=${PYTHON:-python3} constraints=${CONSTRAINTS-constraints.txt}
cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }
pip() { "$venv/bin/python" -m pip "$@"; }
at_least() { "$venv/bin/python" -c "import sys; sys.exit(sys.version_info < ($1))"; }

say "preparing $venv (the first time takes 1 to 3 minutes and up to 2 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
at_least "3, 10" || { say "Python must be at least 3.10, but $venv has $("$venv/bin/python" -V); remove it and set PYTHON=..." >&2; exit 2; }
if [ -n "$constraints" ] && ! at_least "3, 11"; then
    say "$constraints was recorded on Python 3.11 and newer; on this one the resolver chooses the versions"
    constraints=
fi

torch=torch
[ -z "$constraints" ] || torch=$(grep '^torch==' "$constraints")
installed=$(pip freeze | sed -n 's/+.*//; /^torch==/p')
if [[ $installed != "$torch"* ]]; then
    if nvidia-smi --list-gpus >/dev/null 2>&1; then
        say "installing $torch for the GPU"
        pip install -qq "$torch"
    else
        say "installing $torch for the CPU (no GPU found)"
        pip install -qq --no-deps --timeout 5 --retries 0 --index-url "$cpu_index" "$torch" 2>/dev/null || {
            say "$cpu_index cannot be reached; installing $torch from the default index, which may bring CUDA along"
            pip install -qq "$torch"
        }
    fi
fi

say "installing specrl${extras:+[$extras]}${constraints:+ as pinned in $constraints}"
pip install -qq --editable ".${extras:+[$extras]}" ${constraints:+--constraint "$constraints"}
say "done in ${SECONDS} s: $("$venv/bin/python" -V), torch $("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
