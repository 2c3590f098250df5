#!/bin/sh
# Make a virtual environment and install this project into it: tools/install.sh VENV REQUIREMENT
#
# What can be missing on a machine is said in one sentence each, before pip prints a page about it.
# Without an NVIDIA GPU a CPU build of torch is preferred where pip finds one: the CUDA build of the same
# version needs several gigabytes of libraries that nothing would use.
set -eu
venv=$1 requirement=$2
python=${PYTHON:-python3} torch=${TORCH:-auto}
say() { echo "fastsft: $*" >&2; exit 2; }

command -v "$python" >/dev/null 2>&1 || say "no $python here; install Python 3.11 or later, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  say "$("$python" --version) is too old; Python 3.11 or later is needed (set PYTHON=python3.12, say)"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  say "this Python has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON to another one"

if [ ! -x "$venv/bin/python" ]; then
  if [ "$torch" = system ]; then
    "$python" -c 'import torch' 2>/dev/null || say "TORCH=system, but $python has no torch; install it there or leave TORCH out"
    "$python" -m venv --system-site-packages "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ "$torch" = system ]; then
  # The machine's own versions stand: constraints would replace them.
  pip install -q --editable "$requirement"
else
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null 2>&1; then
    version=$(sed -n 's/^torch==//p' constraints.txt)
    pip install -q "torch==$version+cpu" 2>/dev/null || echo "fastsft: pip finds no CPU build of torch $version; taking the usual one" >&2
  fi
  pip install -q -c constraints.txt --editable "$requirement"
fi
