#!/usr/bin/env bash
# Puts the checkout that this script lies in, and its environment, at ~/echo_jax: one host of a pod.
# `tpu_pod.sh install` runs it on all of them. What is in ~/echo_jax/runs stays.
set -euo pipefail
new=$(cd "$(dirname "$0")/.." && pwd)
home=$HOME/echo_jax
mkdir -p "$home/runs/launch"
if ! flock --nonblock "$home/runs/launch/learner.lock" true; then
  echo "error: $(hostname): the learner runs from ~/echo_jax; stop it first" >&2
  exit 1
fi
find "$home" -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +
cp -a "$new/." "$home/"
rm -rf "$new"
cd "$home"

# Sandboxes of the embedded policy; a new machine may still be busy with its own updates.
if ! command -v bwrap > /dev/null; then
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq bubblewrap > /dev/null
fi
# TPU images come with Python 3.10; uv brings the one that the pinned versions were tried with.
export PIP_BREAK_SYSTEM_PACKAGES=1 # it goes to ~/.local, where images that refuse this allow it
python3 -m pip install --quiet --user uv==0.13.9
uv=(python3 -m uv --quiet)
[[ -x .venv/bin/python ]] || "${uv[@]}" venv --python 3.11 .venv
"${uv[@]}" pip install --python .venv/bin/python \
  --requirements requirements-tpu.txt --constraints launch/images/constraints.txt
echo "$(hostname): installed, jax $(.venv/bin/python -c 'from importlib.metadata import version; print(version("jax"))')"
