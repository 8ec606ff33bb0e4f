# shellcheck shell=bash
# end_since TICKS: kills every process of an environment of Harbor's that is not older than that, in
# ticks since the machine started, but the caller and what it runs under. In rounds, since a fork
# bomb makes new ones meanwhile.
end_since() {
  local born=$1 mine=" 1 $BASHPID " p=$BASHPID stat dir found round
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
    [[ $found ]] || return 0
  done
  return 1
}
