# shellcheck shell=bash
# Ends what a command started, and only that: the processes that began since it did, whose parents
# are such processes too, the shell, or process 1, which inherits orphans. A service that was there
# before keeps its children, and the engine's own execs (a health check) have no parent inside.
#
# Prints the seconds since the machine started, reads the clock tick of that count from which on
# processes are the command's, and prints `done` when none is left. Starts no process itself. All are
# stopped before any is killed, or a fork bomb would make new ones in between.
# Argument: the process id of the shell, or 0.
shell=$1
set -f
read -r uptime _ </proc/uptime
echo "$uptime"
read -r since || exit

stat_of() { # fields 3 and on of /proc/PID/stat; the name before them may hold anything
  { IFS= read -r -d '' line <"/proc/$1/stat"; } 2>/dev/null
  # shellcheck disable=SC2206 # words of numbers
  stat=(${line##*) })
  [ ${#stat[@]} -gt 19 ]
}

declare -A ours
pid=$BASHPID
while [ "$pid" -gt 1 ] && stat_of "$pid"; do
  ours[$pid]=1 pid=${stat[1]}
done

is_guilty() {
  local pid=$1
  while :; do
    pid=${parent[$pid]}
    case $pid in "$shell" | 1) return 0 ;; 0) return 1 ;; esac
    [ "${born[$pid]-}" ] || return 0 # it ended meanwhile
    [ "${born[$pid]}" -ge "$since" ] || return 1
  done
}

survey() {
  parent=() born=() victims=()
  local pid alive=()
  set +f
  for pid in /proc/[0-9]*; do
    pid=${pid#/proc/}
    stat_of "$pid" || continue
    parent[$pid]=${stat[1]} born[$pid]=${stat[19]}
    [[ ${stat[0]} == [ZX] || $pid == 1 || ${ours[$pid]-} ]] || alive+=("$pid")
  done
  set -f
  for pid in "${alive[@]}"; do
    [ "$pid" = "$shell" ] || { [ "${born[$pid]}" -ge "$since" ] && is_guilty "$pid"; } || continue
    victims+=("$pid")
  done
}

declare -A parent born stopped
while survey; [ ${#victims[@]} -gt 0 ]; do
  [ "$SECONDS" -lt 30 ] || exit # nobody waits any more
  fresh=()
  for pid in "${victims[@]}"; do
    [ "${stopped[$pid]-}" = "${born[$pid]}" ] || fresh+=("$pid")
    stopped[$pid]=${born[$pid]}
  done
  if [ ${#fresh[@]} -gt 0 ]; then
    kill -STOP "${fresh[@]}" 2>/dev/null
  else
    kill -KILL "${victims[@]}" 2>/dev/null
  fi
done
echo 'done'
