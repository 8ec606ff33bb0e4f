#!/usr/bin/env bash
# Makes a TPU pod with Google Cloud's CLI, installs this checkout, and runs a learner on all its hosts.
#
#   launch/tpu_pod.sh COMMAND [--flag=VALUE ...] [-- flags of echo_jax.train]
#
#   create    makes the pod now, or fails          queue   asks for it and returns; wait until it is there
#   install   sends this checkout to every host    start   the learner on every host, unless it runs
#   status    of the pod and of the learner        log     follows the learner's output on one host
#   stop      SIGTERM on every host, then waits: the run saves, and `start` goes on from there
#   delete    the pod, and its place in the queue
#
#   --zone=ZONE          of the pod; always needed      --project=ID   else the one gcloud is set to
#   --name=NAME          echo-jax                       --spot         cheaper; may be taken away
#   --topology=TOPOLOGY  v5p:2x2x4, as echo_jax.plan says it, or v5p-32, as Google Cloud does
#   --runtime_version=V  the image; else the usual one of the generation
#   --commit=COMMIT      what install sends: HEAD       --worker=N     the host that log follows: 0
#   --config=FILE        configs/qwen3_8b.py            --workdir=URL  of the run; start needs it
#   --patience=SECONDS   that stop waits for: 900       --dry_run      prints the commands instead
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/flags.sh
source "$root/launch/flags.sh"
flags+=([name]=echo-jax [zone]='' [project]='' [topology]=v5p:2x2x4 [runtime_version]='' [spot]=false
  [commit]=HEAD [worker]=0 [config]=configs/qwen3_8b.py [workdir]='' [patience]=900)

# Sets accelerator, chips, hosts and runtime from --topology. Google Cloud counts two cores a chip in
# the names of v4 and v5p, chips in those of v5e and v6e, and has one shape of each size.
# https://cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, and runtimes
resolve_topology() {
  local flat='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
  local cubes='2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16' known=''
  local generation prefix cores shapes shape
  while read -r generation prefix cores runtime shapes; do
    for shape in $shapes; do
      chips=$((${shape//x/*}))
      accelerator=$prefix-$((chips * cores)) hosts=$((chips / 4))
      if ((cores == 1 && chips <= 8)); then hosts=1; fi # a host of v5e and v6e may have eight
      if [[ ${flags[topology]} == "$generation:$shape" || ${flags[topology]} == "$accelerator" ]]; then
        runtime=${flags[runtime_version]:-$runtime}
        return
      fi
      [[ ${flags[topology]} != "${generation}"[:-]* ]] || known+=" $generation:$shape"
    done
  done << END
v4 v4 2 tpu-ubuntu2204-base $cubes
v5e v5litepod 1 v2-alpha-tpuv5-lite $flat
v5p v5p 2 v2-alpha-tpuv5 $cubes
v6e v6e 1 v2-alpha-tpuv6e $flat
END
  die "unknown --topology=${flags[topology]}; expected${known:- v4:, v5e:, v5p: or v6e: and a shape, as v5p:2x2x4}"
}

tpus() { # SERVICE VERB NAME ARGUMENTS...; puts what all calls share after the name
  run gcloud compute tpus "${@:1:3}" "${where[@]}" "${@:4}"
}

on_hosts() { # WORKERS COMMAND; the hosts' shells run the command line in the home folder
  tpus tpu-vm ssh "${flags[name]}" "--worker=$1" "--command=$2"
}

create() {
  resolve_topology
  echo "# ${flags[topology]}: accelerator type $accelerator, chips: $chips, hosts: $hosts"
  local kind=() service=$1 version=$2
  ${flags[spot]} && kind=(--spot)
  [[ $service == tpu-vm ]] || kind+=("--node-id=${flags[name]}")
  tpus "$service" create "${flags[name]}" \
    "--accelerator-type=$accelerator" "--$version=$runtime" "${kind[@]}"
}

wait_for_pod() {
  local state
  local question=(tpus queued-resources describe "${flags[name]}" '--format=value(state.state)')
  if ${flags[dry_run]}; then
    echo '# every 30 s, until it says ACTIVE:'
    "${question[@]}"
    return
  fi
  while true; do
    state=$("${question[@]}")
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        die "${flags[name]} is $state and will not come; delete it and queue again" ;;
    esac
    echo "$(date +%T) $state"
    sleep 30
  done
}

install() {
  local archive=runs/launch/echo_jax.tar.gz
  if ! ${flags[dry_run]}; then
    git rev-parse --quiet --verify "${flags[commit]}^{commit}" > /dev/null ||
      die "--commit=${flags[commit]} is no commit of $root"
    git diff --quiet HEAD || echo '# uncommitted changes are not sent' >&2
  fi
  run mkdir -p runs/launch
  run git archive --format=tar.gz "--output=$archive" "${flags[commit]}"
  tpus tpu-vm scp "$archive" "${flags[name]}:echo_jax.tar.gz" --worker=all
  on_hosts all 'rm -rf echo_jax.new && mkdir echo_jax.new && tar -xzf echo_jax.tar.gz -C echo_jax.new && echo_jax.new/launch/tpu_install.sh'
}

start() {
  resolve_topology
  need workdir 'it is a folder of a bucket, as gs://bucket/run'
  if ((hosts > 1)) && [[ ${flags[workdir]} != gs://?* ]]; then
    die "--workdir=${flags[workdir]} is on one host and ${flags[topology]} has $hosts; give one that all reach, as gs://bucket/run"
  fi
  # With this JAX_PLATFORMS, a TPU that does not come up is an error and not a run on the CPU.
  on_hosts all "cd echo_jax && $(quoted env JAX_PLATFORMS=tpu,cpu launch/process.sh start learner \
    .venv/bin/python -m echo_jax.train "--config=${flags[config]}" "--workdir=${flags[workdir]}" "${extra[@]}")"
}

status() {
  tpus tpu-vm describe "${flags[name]}" '--format=value(acceleratorType,state,health)'
  on_hosts all 'echo_jax/launch/process.sh status learner'
}

delete() {
  if ${flags[dry_run]}; then
    echo '# if it was queued:'
    tpus queued-resources delete "${flags[name]}" --force
    echo '# otherwise:'
    tpus tpu-vm delete "${flags[name]}"
  elif tpus queued-resources describe "${flags[name]}" --format=none 2> /dev/null; then
    tpus queued-resources delete "${flags[name]}" --force # its pod as well
  else
    tpus tpu-vm delete "${flags[name]}"
  fi
}

command=${1-help}
case $command in
  create | queue | wait | install | start | status | log | stop | delete) ;;
  help | --help) usage && exit ;;
  *) die "unknown command '$command'; $0 help lists them" ;;
esac
parse_flags "${@:2}"
[[ $command == start || ${#extra[@]} == 0 ]] || die "$command takes nothing after --"
need zone 'the zone of the pod, as us-east5-a'
where=("--zone=${flags[zone]}")
[[ ! ${flags[project]} ]] || where+=("--project=${flags[project]}")
${flags[dry_run]} || command -v gcloud > /dev/null ||
  die 'gcloud is not on the PATH; install it (https://cloud.google.com/sdk/docs/install), or see what it would do with --dry_run'
cd "$root"
case $command in
  create) create tpu-vm version ;;
  queue) create queued-resources runtime-version ;;
  wait) wait_for_pod ;;
  log) on_hosts "${flags[worker]}" 'echo_jax/launch/process.sh log learner' ;;
  stop) on_hosts all "$(quoted echo_jax/launch/process.sh stop "${flags[patience]}" learner)" ;;
  *) "$command" ;;
esac
