#!/usr/bin/env bash
# Make or refresh the virtual environment that builds the documentation: the packages of the extra 'docs', and not
# specrl itself, whose sources are only read.
# usage: [PYTHON=python3] tools/setup_docs.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

echo "setup: preparing $venv (the first time takes about a quarter of a minute and 100 MB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
constraints=(--constraint tools/docs_constraints.txt)
"$venv/bin/python" -c "import tomllib" 2>/dev/null || constraints=()  # Python 3.10: the resolver chooses the versions
wanted=$("$venv/bin/python" - <<'PYTHON'
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"]["docs"]))
PYTHON
)
"$venv/bin/python" -m pip install -qq "${constraints[@]}" --requirement <(echo "$wanted")
