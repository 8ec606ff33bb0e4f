#!/usr/bin/env bash
# Starts one long process on this machine, only once, tells how it is, and ends it gently. It restarts nothing.
#
#   launch/process.sh start NAME COMMAND...     unless NAME runs already
#   launch/process.sh status NAMES...           names may be patterns: 'worker*'
#   launch/process.sh stop SECONDS NAMES...     SIGTERM, then so long for it to save and end
#   launch/process.sh log NAME                  follows its output
#
# It writes NAME.log, NAME.pid and NAME.lock in runs/launch. The process holds the lock as long as it
# lives, so that a process number that now belongs to another process is never signalled.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/launch

say() { echo "$(hostname): $name $*"; }

alive() { ! flock --nonblock "runs/launch/$name.lock" true; }

start() {
  exec 9>> "runs/launch/$name.lock" # the process inherits it, and with it the lock
  if ! flock --timeout 1 9; then
    say "runs already, pid $(< "runs/launch/$name.pid")"
    return
  fi
  setsid "$@" >> "runs/launch/$name.log" 2>&1 < /dev/null &
  echo $! > "runs/launch/$name.pid"
  exec 9>&-
  sleep 1 # long enough for a wrong path to show
  if ! alive; then
    say "ended at once: $(tail -n 1 "runs/launch/$name.log")" >&2
    exit 1
  fi
  say "started, pid $!, log runs/launch/$name.log"
}

status() {
  if alive; then
    say "runs, pid $(< "runs/launch/$name.pid"): $(tail -n 1 "runs/launch/$name.log")"
  else
    say 'does not run'
  fi
}

stop() {
  if ! alive; then
    say 'does not run'
    return
  fi
  kill -TERM "$(< "runs/launch/$name.pid")" 2> /dev/null || true # it may end this moment
  if ! flock --timeout "$1" "runs/launch/$name.lock" true; then
    say "still runs $1 s after SIGTERM; wait with the same command" >&2
    exit 1
  fi
  say 'stopped'
}

# Prints which of the names and patterns were ever started here.
started() {
  local pattern
  for pattern; do
    compgen -G "runs/launch/$pattern.lock" || [[ $pattern == *'*'* ]] ||
      echo "$(hostname): $pattern was never started" >&2
  done | sed 's|.*/||; s|\.lock$||'
}

case ${1-} in
  start | log) (($# > 1)) || set -- help ;;
  status) (($# > 1)) || set -- help ;;
  stop) (($# > 2)) || set -- help ;;
esac
case ${1-} in
  start) name=$2 start "${@:3}" ;;
  status) for name in $(started "${@:2}"); do status; done ;;
  stop) for name in $(started "${@:3}"); do stop "$2"; done ;;
  log) exec tail -n 100 -F "runs/launch/$2.log" ;;
  *) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" >&2 && exit 1 ;;
esac
