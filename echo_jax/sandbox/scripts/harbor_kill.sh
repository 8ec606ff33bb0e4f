# shellcheck shell=bash
# Kills every process of an environment of Harbor's that is younger than the sandbox, but this shell
# and what it runs under. In rounds, since a fork bomb makes new ones meanwhile.
# Arguments: our folder (unused), the mark that the last line begins with, and when the sandbox
# began, in ticks since the machine started (harbor_start.sh).
mark=$2 born=$3
mine=" 1 $$ " p=$$
while (( p > 1 )); do
  read -r stat <"/proc/$p/stat"
  read -r _ p _ <<<"${stat##*) }" # state and parent
  mine="$mine$p "
done
for (( round = 0; round < 200; round++ )); do
  found=
  for dir in /proc/[0-9]*; do
    case $mine in *" ${dir#/proc/} "*) continue ;; esac
    { read -r stat <"$dir/stat"; } 2>/dev/null || continue
    # shellcheck disable=SC2086  # numbers, split into words
    set -- ${stat##*) }
    [[ $1 != Z ]] && (( ${20} >= born )) && kill -9 "${dir#/proc/}" 2>/dev/null && found=1
  done
  [[ $found ]] || { echo "$mark clear"; exit; }
done
