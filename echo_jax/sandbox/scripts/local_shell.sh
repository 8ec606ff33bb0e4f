# shellcheck shell=bash
# The last steps from process 1 of a local sandbox to the agent's shell: a root that is read-only,
# limits, no capabilities. Bash, because `ulimit -u` is not in POSIX.
# Arguments: `ro`, or `rw` while the task's Dockerfile is followed; the largest file in KiB, open
# files, CPU seconds, KiB of memory, processes.
[ "$1" = rw ] || mount -o remount,bind,ro / || exit
shift
ulimit -c 0; ulimit -f "$1"; ulimit -n "$2"; ulimit -t "$3"
ulimit -v "$4"; ulimit -u "$5"
exec setpriv --no-new-privs --bounding-set -all --ambient-caps -all --inh-caps -all -- \
  bash --norc --noprofile -s
