#!/usr/bin/env bash
# Runs the learner on some GPUs of a machine and rollout workers on others, or on the same ones.
#
#   launch/gpu_box/gpu_box.sh COMMAND [--flag=VALUE ...] [-- flags for learner and workers]
#
#   start     the learner, then the workers: those that do not run. One run a checkout at a time
#   status    of all of them                      log    follows the output of --process
#   stop      workers, then the learner, with time to save; `start` goes on from there
#   split     only says what of which GPU goes to whom
#
#   --config=FILE        configs/qwen3_8b.py      --workdir=URL         of the run; start needs it
#   --learner_gpus=0,1   0; none: on the CPU      --python=FILE         .venv/bin/python
#   --worker_gpus=2,3    none                     --worker_python=FILE  .venv-rollout/bin/python
#   --workers=N          0; each gets as many of worker_gpus, whole ones
#   --learner_percent=N  55, of GPUs that both use
#   --gpu_gib=N          memory of a GPU; else as nvidia-smi says
#   --process=NAME       learner; or worker0, ...
#   --patience=SECONDS   that stop waits for each: 900          --dry_run  prints the commands instead
#
# A tenth of the memory of a GPU stays free for CUDA contexts, NCCL and cuDNN. The rest goes to the
# learner (XLA_PYTHON_CLIENT_MEM_FRACTION, taken at its start) or to a worker (vLLM's
# gpu_memory_utilization). On a GPU that both use, the learner gets --learner_percent and the worker
# what is left: the learner holds 16 bytes a parameter (float32 parameters, gradients, two moments)
# and activations, the worker 2 bytes and its cache. A process spreads evenly over its GPUs, so one
# that is shared sets its part of all.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=launch/flags.sh
source "$root/launch/flags.sh"
flags+=([config]=configs/qwen3_8b.py [workdir]='' [learner_gpus]=0 [worker_gpus]=none [workers]=0
  [learner_percent]='' [gpu_gib]='' [python]=.venv/bin/python
  [worker_python]=.venv-rollout/bin/python [process]=learner [patience]=900)
pools=90 # percent of a GPU that learner and worker may have together

# gpus FLAG: prints the GPUs that the flag names, with a space between them.
gpus() {
  local value=${flags[$1]}
  [[ $value != none ]] || return 0
  [[ $value =~ ^[0-9]+(,[0-9]+)*$ ]] ||
    die "--$1=$value names no GPUs; expected their numbers, as 0,1, or none"
  [[ -z $(tr , '\n' <<< "$value" | sort | uniq -d) ]] || die "--$1=$value names a GPU twice"
  echo "${value//,/ }"
}

# is_in WORD WORDS...
is_in() { [[ " ${*:2} " == *" $1 "* ]]; }

# Sets learner_gpus, worker_gpus, workers, each (GPUs of a worker) and learner_percent.
assign() {
  local list gpu shared=false
  list=$(gpus learner_gpus)
  read -ra learner_gpus <<< "$list"
  list=$(gpus worker_gpus)
  read -ra worker_gpus <<< "$list"
  workers=$((flags[workers])) each=0
  ((workers || !${#worker_gpus[@]})) || die "--worker_gpus=${flags[worker_gpus]} needs --workers"
  ((!workers || ${#worker_gpus[@]})) || die "--workers=$workers needs --worker_gpus"
  ((!workers)) || each=$((${#worker_gpus[@]} / workers))
  ((each * workers == ${#worker_gpus[@]})) ||
    die "${#worker_gpus[@]} GPUs do not divide over --workers=$workers; each gets as many"
  for gpu in "${learner_gpus[@]}"; do
    ! is_in "$gpu" "${worker_gpus[@]}" || shared=true
  done
  learner_percent=$pools
  if $shared; then
    learner_percent=$((flags[learner_percent] ? flags[learner_percent] : 55))
    ((0 < learner_percent && learner_percent < pools)) ||
      die "--learner_percent=$learner_percent of a shared GPU; expected 1 to $((pools - 1))"
  elif [[ ${flags[learner_percent]} ]]; then
    die "--learner_percent=${flags[learner_percent]} has no effect; no GPU is shared"
  fi
}

# Sets own_gpus of worker number $1, shared_gpu (the last, or '') and percent.
assign_worker() {
  local gpu
  own_gpus=("${worker_gpus[@]:$1 * each:each}") shared_gpu='' percent=$pools
  for gpu in "${own_gpus[@]}"; do
    ! is_in "$gpu" "${learner_gpus[@]}" || shared_gpu=$gpu percent=$((pools - learner_percent))
  done
}

# Waits until the learner has its pool on GPU $1. vLLM measures how much memory it needs by what the
# GPU gains meanwhile, so a learner that grows at that time would be counted as vLLM.
await_learner() {
  local seconds used
  if ${flags[dry_run]}; then
    echo "# once the learner has its part of GPU $1:"
    return
  fi
  for ((seconds = 0; seconds < 300; seconds += 5)); do
    used=$(nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader,nounits "--id=$1")
    ((${used%,*} * 100 < ${used#*,} * (learner_percent - 2))) || return 0
    sleep 5
  done
  die "after 300 s the learner has not taken $learner_percent% of GPU $1; see $0 log"
}

# part NAME PERCENT MIB: prints 'learner 55% (44.0 GiB), ' for a GPU of so many MiB; 0 if unknown.
part() {
  local tenths=$(($3 * $2 / 1024 / 10))
  (($3)) && echo -n "$1 $2% ($((tenths / 10)).$((tenths % 10)) GiB), " || echo -n "$1 $2%, "
}

split() {
  local gpu worker mib left
  for gpu in $(printf '%s\n' "${learner_gpus[@]}" "${worker_gpus[@]}" | sort -nu); do
    mib=$((flags[gpu_gib] * 1024)) left=100
    if ((!mib)) && ! ${flags[dry_run]}; then
      command -v nvidia-smi > /dev/null ||
        die 'nvidia-smi is not on the PATH; is there a GPU? --learner_gpus=none runs on the CPU, --dry_run only shows'
      mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits "--id=$gpu") ||
        die "GPU $gpu is not on this machine; nvidia-smi --list-gpus says which are"
    fi
    echo -n "# GPU $gpu: "
    if is_in "$gpu" "${learner_gpus[@]}"; then
      part learner "$learner_percent" "$mib"
      left=$((left - learner_percent))
    fi
    for ((worker = 0; worker < workers; worker++)); do
      assign_worker "$worker"
      is_in "$gpu" "${own_gpus[@]}" || continue
      part "worker$worker" "$percent" "$mib"
      left=$((left - percent))
    done
    echo "$left% left"
  done
}

# list GPUS...: prints them as CUDA_VISIBLE_DEVICES wants them
list() { (IFS=, && echo "$*"); }

start() {
  local worker run_flags=("--config=${flags[config]}" "--workdir=${flags[workdir]}")
  local placed=(JAX_PLATFORMS=cpu)
  split
  if ((${#learner_gpus[@]})); then # if CUDA does not come up, the learner ends with an error and does not run on the CPU
    placed=("CUDA_VISIBLE_DEVICES=$(list "${learner_gpus[@]}")" "JAX_PLATFORMS=cuda,cpu"
      "XLA_PYTHON_CLIENT_MEM_FRACTION=0.$(printf %02d "$learner_percent")")
  fi
  run env "${placed[@]}" launch/process.sh start learner \
    "${flags[python]}" -m echo_jax.train "${run_flags[@]}" "${extra[@]}"
  for ((worker = 0; worker < workers; worker++)); do
    assign_worker "$worker"
    [[ ! $shared_gpu ]] || await_learner "$shared_gpu"
    run env "CUDA_VISIBLE_DEVICES=$(list "${own_gpus[@]}")" launch/process.sh start "worker$worker" \
      "${flags[worker_python]}" -m echo_jax.worker "${run_flags[@]}" \
      "--tensor_parallel=$each" \
      "--gpu_memory_utilization=0.$(printf %02d "$percent")" "${extra[@]}"
  done
}

command=${1-help}
case $command in
  start | status | log | stop | split) ;;
  help | --help) usage && exit ;;
  *) die "unknown command '$command'; $0 help lists them" ;;
esac
parse_flags "${@:2}"
[[ $command == start || ${#extra[@]} == 0 ]] || die "$command takes nothing after --"
for number in workers learner_percent gpu_gib patience; do
  [[ ${flags[$number]} =~ ^(0|[1-9][0-9]{0,5})?$ ]] ||
    die "--$number=${flags[$number]}; expected a whole number"
done
cd "$root"
case $command in
  start | split)
    [[ $command == split ]] || need workdir 'it is a folder, as runs/qwen3_8b, or a URL'
    assign
    "$command"
    ;;
  status) run launch/process.sh status learner 'worker*' ;;
  log) run launch/process.sh log "${flags[process]}" ;;
  stop) run launch/process.sh stop "${flags[patience]}" 'worker*' learner ;;
esac
