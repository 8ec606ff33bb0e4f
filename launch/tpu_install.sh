#!/usr/bin/env bash
# Installs the checkout that this script lies in at ~/echo_jax, with its environment, on one host of a
# pod. `tpu_pod.sh install` runs it on every host. It leaves ~/echo_jax/runs as it is.
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

# For the sandboxes of the embedded policy. A new machine may still hold the lock for its own updates.
if ! command -v bwrap > /dev/null; then
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq bubblewrap > /dev/null
fi
# TPU images come with Python 3.10. uv brings the Python that the pinned versions were tried with.
export PIP_BREAK_SYSTEM_PACKAGES=1 # newer images refuse pip without it; uv goes to ~/.local
python3 -m pip install --quiet --user uv==0.13.9
uv=(python3 -m uv --quiet)
[[ -x .venv/bin/python ]] || "${uv[@]}" venv --python 3.11 .venv
"${uv[@]}" pip install --python .venv/bin/python \
  --requirements requirements-tpu.txt --constraints launch/images/constraints.txt
echo "$(hostname): installed, jax $(.venv/bin/python -c 'from importlib.metadata import version; print(version("jax"))')"
