#!/usr/bin/env bash
# Make a virtual environment in which SGLang runs on a CPU, for tests/sglang: no CUDA packages, about 2 GB.
# usage: [PYTHON=python3] tools/setup_sglang.sh VENV
#
# SGLang's own requirements bring CUDA along, so it and what pins CUDA come without theirs; the rest is named here. Our
# package is installed without its requirements too, for its entry point: the plugin needs what SGLang has anyway.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${PYTHON:-python3}
sglang=sglang==0.5.23 torch=torch==2.13.0
cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }
pip() { "$venv/bin/python" -m pip "$@"; }

say "preparing $venv with $sglang (1 to 5 minutes, about 2 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! "$venv/bin/python" -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))"; then
    say "Python must be 3.11 or 3.12, but $venv has $("$venv/bin/python" -V); remove it and set PYTHON=..." >&2
    exit 2
fi

say "installing $torch for the CPU"
pip install -qq --timeout 30 --retries 1 --index-url "$cpu_index" "$torch" 2>/dev/null || pip install -qq "$torch"
say "installing $sglang"
pip install -qq --no-deps "$sglang" transformers==5.19.0 compressed-tensors==0.18.0 torchvision==0.28.0 \
    xgrammar==0.2.7 llguidance gguf dill sentencepiece==0.2.1 triton==3.7.1
pip install -qq tokenizers==0.23.2 aiohttp apache-tvm-ffi==0.1.11 einops fastapi huggingface_hub interegular IPython \
    jsonschema loguru msgspec numpy openai==2.8.0 openai-harmony==0.0.4 orjson packaging partial_json_parser pillow \
    prometheus-client psutil pybase64 pydantic python-multipart pyzmq regex requests safetensors setproctitle \
    soundfile tqdm uvicorn uvloop xxhash zstandard pytest gymnasium rich \
    'jsonargparse[signatures]>=4.40,<5' 2> >(grep -v -e 'which is not installed' \
    -e 'which is incompatible' -e 'dependency resolver' >&2)
say "installing specrl, without requirements"
pip install -qq --no-deps --no-build-isolation --editable . 2>/dev/null || pip install -qq --no-deps --editable .
say "done in ${SECONDS} s"
