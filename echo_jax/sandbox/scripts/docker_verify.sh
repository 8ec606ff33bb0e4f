# shellcheck shell=bash
# Runs a task's tests beside the agent's container, where nothing that the agent left running can
# reach their files or their reward; see docker/verify.py. Runs as root, with the right to mount, in
# a container of a trusted image: so no program and no library of the agent's may run before rights
# are given up, and nothing may be mounted to a path that the agent can turn into a link.
#
# /x is the root of the agent's container. The tests' root, /r, is made of the directories in it, all
# but /tests and /logs. Standard input is two tar archives: what the image itself has in /tests, then
# the task's tests. Prints `done`, or `late` if the time was over; then follows verifier_read.sh. Else
# it prints a command that failed, after `unable` or, if it was about something of the agent's, which
# may change at any time, after `changed`.
# Arguments: the user, the working directory, seconds, the sizes of the archives, a script for the
# tests' side, names that are left out of the root, and the tests' variables.
set -eE
trap 'echo "unable: $BASH_COMMAND"' ERR
user=$1 workdir=$2 seconds=$3 image_size=$4 tests_size=$5 script=$6 left_out=$7
shift 7
shopt -s nullglob dotglob
mkdir /r/{dev,logs,proc,sys,tests} /logs/{agent,artifacts,verifier}
chmod 777 /logs/*
for name in dev logs proc sys; do mount --rbind "/$name" "/r/$name"; done
for size in "$image_size" "$tests_size"; do
  [ "$size" = 0 ] || head -c "$size" | tar -xp --numeric-owner -C /r/tests
done
[ -x /r/tests/test.sh ] || chmod +x /r/tests/test.sh
trap 'echo "changed: $BASH_COMMAND"' ERR
for path in /x/*; do
  name=${path##*/}
  case $name in .dockerenv | dev | logs | proc | sys | tests) continue ;; esac
  [[ " $left_out " != *" $name "* ]] || continue
  if [ -L "$path" ]; then
    cp -P "$path" "/r/$name"
  elif [ -d "$path" ]; then
    mkdir "/r/$name"
    mount --rbind "$path" "/r/$name"
  elif [ -f "$path" ]; then
    : >"/r/$name"
    mount --bind "$path" "/r/$name"
  fi
done
for name in agent artifacts; do
  [ ! -d "/x/logs/$name" ] || mount --rbind "/x/logs/$name" "/r/logs/$name"
done
# As Docker takes a number that no account has.
if [[ $user =~ ^[0-9]+$ ]] && ! grep -q "^[^:]*:[^:]*:$user:" /r/etc/passwd; then user=$user:0; fi
trap - ERR
set +e
# Docker's own capabilities, and one more that is of no use here. The kernel lets no process trace
# one that has a capability which it lacks itself, so not even the agent's root can.
rights=-all
for name in audit_write chown dac_override fowner fsetid kill mknod net_bind_service net_raw setfcap \
  setgid setpcap setuid sys_chroot wake_alarm; do
  rights+=,+$name
done
more=(--inh-caps=-all)
case $user in 0 | 0:* | root | root:*) ;; *)
  # Another account than root has a capability only if it is handed down, past the change of accounts.
  # shellcheck disable=SC2054 # the commas are setpriv's
  more=(--inh-caps=-all,+wake_alarm --ambient-caps=-all,+wake_alarm --securebits=+no_setuid_fixup)
  ;;
esac
began=${EPOCHREALTIME/[.,]/}
/usr/bin/timeout --signal=KILL "$seconds" /usr/bin/setpriv "${more[@]}" --bounding-set="$rights" \
  /usr/bin/env -i "$@" /usr/sbin/chroot --userspec="$user" /r bash -c "$script" bash "$workdir" \
  </dev/null >/dev/null 2>&1
took=$((${EPOCHREALTIME/[.,]/} - began))
LC_ALL=C printf -v limit %.0f "${seconds}e6"
if [ "$took" -ge "$limit" ]; then echo late; else echo 'done'; fi
