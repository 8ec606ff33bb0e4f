# shellcheck shell=bash
# Process 1 of a local sandbox: finishes the root, then serves the requests that come on standard
# input, one line each, and answers on standard output (see local/namespaces.py). Follows put.sh.
#
# From the environment: INSIDE_PATH, the PATH inside; SIZE and INODES of the tmpfs that is the root;
# ID, the agent's uid; WRITABLE, the directories it may write to; S, T and O, the descriptors of the
# shell's script, status and stdout (2 is its stderr); LIMITS, the largest file in KiB, open files, CPU
# seconds, KiB of memory, processes. Without bubblewrap also SKELETON, a tar archive in base64 of the
# root's directories, files and links, and FSTAB, what is mounted on it.
export PATH=$INSIDE_PATH
die() { echo "$1" >&2; exit 1; }
umask 022
if [[ $SKELETON ]]; then
  # The root is built over /tmp, of this mount namespace alone.
  { mount -t tmpfs -o mode=0755 tmpfs /tmp && cd /tmp; } || die 'cannot mount a tmpfs'
  base64 -d <<<"$SKELETON" | tar -xpf - || die 'cannot make the root'
  echo "$FSTAB" >etc/fstab # a file, since mount reads no pipe
  mount -a -T etc/fstab || die 'cannot mount the root'
  { pivot_root . old && cd / && umount -l /old && rmdir /old; } || die 'cannot change the root'
  { hostname sandbox; ip link set lo up; } 2>/dev/null
fi
# shellcheck disable=SC2153  # SIZE is of the environment, `size` of a request
mount --make-rshared -t tmpfs -o "remount,mode=0755,size=$SIZE,nr_inodes=$INODES" tmpfs / ||
  die 'no tmpfs'
printf 'root:x:0:0::/:/bin/sh\nagent:x:%s:%s::/root:/bin/bash\n' "$ID" "$ID" >/etc/passwd
printf 'root:x:0:\nagent:x:%s:\n' "$ID" >/etc/group
printf '127.0.0.1 localhost sandbox\n::1 localhost\n' >/etc/hosts
printf 'sandbox\n' >/etc/hostname
{ echo 0 >/proc/sys/user/max_user_namespaces; } 2>/dev/null || die 'cannot forbid namespaces'
for d in $WRITABLE; do echo "$d $d none bind,nosuid,nodev"; done >/etc/fstab
{ mount -a -T /etc/fstab && : >/etc/fstab; } || die 'cannot mount'
export -n S T O LIMITS
export -n SIZE INODES
unset SCRIPT INSIDE_PATH SKELETON FSTAB WRITABLE ID OLDPWD
root=ro overlaid='' tests='' view=''
exec 9>&2 2>/dev/null

# The shell sees `/` read-only. A mount made here appears there too, and can be written.
place() {
  local top=${1#/}
  top=/${top%%/*}
  [[ -e $top ]] || mount --bind -o X-mount.mkdir "$top" "$top"
}

# While the task's Dockerfile is followed, `/` can be written. So can those directories of /usr that
# are named, one a line: an overlay lays them over the host's own. Only a directory that lies in the
# overlay from the start can, since no file of the host's root can be copied up to it. Without a name
# there is no overlay, since nothing is to be written there.
build_begin() {
  root=rw
  [[ $1 ]] || return 0
  # Over /run for a moment: the overlay keeps it when it is unmounted there, and nobody finds it.
  mount -t tmpfs -o "mode=0755,size=$SIZE,nr_inodes=$INODES" tmpfs /run || return
  local d new=(/run/upper /run/work)
  while IFS= read -r d; do [[ -d $d ]] && new+=("/run/upper/${d#/usr}"); done <<<"$1"
  mkdir -p "${new[@]}"
  d=lowerdir=/usr,upperdir=/run/upper,workdir=/run/work,userxattr
  mount -t overlay -o "$d" overlay /usr && overlaid=1 # else a RUN finds /usr read-only, and says so
  umount -l /run
}

# Then `/` and /usr are read-only again, but for the new directories at the top and the working
# directory $1. What there is in /tests is kept, in a file that only this process can reach.
build_end() {
  local d point binds=()
  local -A mounted=()
  root=ro
  while read -r _ _ _ _ point _; do mounted[$point]=1; done </proc/self/mountinfo
  for d in /*; do
    case $d in /etc | /dev | /proc | /usr) continue ;; esac
    [[ ! -d $d || -L $d ]] || binds+=("$d")
  done
  [[ ! $overlaid || $1 != /usr/* ]] || binds+=("$1")
  : >/etc/fstab
  for d in "${binds[@]}"; do
    d=${d//\\/\\134} d=${d// /\\040} d=${d//$'\t'/\\011} d=${d//$'\n'/\\012} # as in mountinfo
    [[ ${mounted[$d]-} ]] || echo "$d $d none bind"
  done >/etc/fstab
  [[ ! -s /etc/fstab ]] || { mount -a -T /etc/fstab && : >/etc/fstab; } || return # one process for all
  [[ ! $overlaid ]] || mount -o remount,bind,ro /usr || return
  if [[ -d /tests && ! -L /tests ]]; then
    tar -C /tests -cf /.tests . && exec {tests}</.tests
    rm -f /.tests
  fi
}

restore_tests() { [[ ! $tests ]] || tar -C /tests -xpf "/dev/fd/$tests" --no-same-owner; }
is_directory() { [[ -d $1 ]]; }
mount_empty() { mkdir -p "$1" && mount -t tmpfs -o "mode=0755,size=$SIZE" tmpfs "$1"; }
unmount_empty() { umount -l "$1"; }

# The last steps to the agent's shell: limits, a root that is read-only, no capabilities. The root is
# so in a mount namespace that the first shell gets and those after it share: process 1 keeps it as
# the descriptor `view`. While the task's Dockerfile is followed, each has its own.
open_shell() {
  local limits agent
  read -ra limits <<<"$LIMITS"
  ulimit -c 0 -f "${limits[0]}" -n "${limits[1]}" -t "${limits[2]}" -v "${limits[3]}" -u "${limits[4]}"
  agent=(setpriv --no-new-privs --bounding-set -all --ambient-caps -all --inh-caps -all --)
  agent+=(bash --norc --noprofile -s)
  if [[ $view ]]; then
    exec {view}<&- nsenter --mount="/proc/1/fd/$view" -- "${agent[@]}"
  fi
  [[ $root == rw ]] || agent=(sh -c 'mount -o remount,bind,ro / && exec "$@"' sh "${agent[@]}")
  exec unshare --mount --propagation slave -- "${agent[@]}"
}

set -m # or what begins with `&`, the agent's shell, would ignore SIGINT
shell=
echo ready
while IFS=' ' read -r request size escaped; do
  printf -v path %b "$escaped"
  case $request in
    shell)
      (
        export SHLVL=0
        exec <&"$S" >&"$T" 8>&"$O"
        exec {S}<&- {T}>&- {O}>&-
        [[ ! $tests ]] || exec {tests}<&-
        open_shell
      ) &
      shell=$! ;;
    wait) wait "$shell"; echo $? ;;
    kill)
      [[ ! $shell || $root == rw || $view ]] || exec {view}<"/proc/$shell/ns/mnt" || view=
      # Again and again, since a fork bomb makes new ones; meanwhile the script's pipe is emptied.
      while kill -9 -1; do read -r -t .001 -N 65536 -u "$S"; done
      while read -t 0 -u "$S" && read -r -t .01 -N 65536 -u "$S"; do :; done
      wait
      shell=
      echo 'done' ;;
    put) put "$size" "$path" ;;
    copy) put "$size" / --no-overwrite-dir --keep-directory-symlink ;;
    is_directory | build_begin | build_end | mount_empty | unmount_empty | restore_tests)
      if "$request" "$path"; then echo 'done'; else echo "error $request failed"; fi ;;
  esac
done
