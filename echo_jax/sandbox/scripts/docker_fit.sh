# shellcheck shell=sh
# Fits a task's image for StrictSandbox; runs as root while the image is built, with the image's own
# sh. Adds a copy of bash that may be run but not read, so that the kernel lets nobody trace it
# (process 1); the agent's account; and a copy of what the agent's directories hold, since they will
# be tmpfs.
# Arguments: the agent's uid, the directory that is ours, the directories that the agent may write.
set -e
user=$1 home=$2; shift 2
bash=$(command -v bash) || { echo 'the image has no bash; install it'; exit 1; }
mkdir -p "$home/seeds" /logs/agent /logs/verifier /logs/artifacts "$@"
cp "$bash" "$home/init" && chmod 0111 "$home/init" && ln -sf "$bash" "$home/bash"
known() { grep -q "^[^:]*:[^:]*:$user:" "$1"; }
known /etc/passwd || echo "agent:x:$user:$user::/root:/bin/bash" >>/etc/passwd
known /etc/group || echo "agent:x:$user:" >>/etc/group
if [ "$user" = 0 ]; then
  # apt changes its user, which a root without capabilities cannot.
  [ ! -d /etc/apt ] || echo 'APT::Sandbox::User "root";' >/etc/apt/apt.conf.d/99echo_jax
  for d in /var/cache/apt/archives/partial /var/lib/apt/lists/partial; do
    [ ! -d $d ] || chown 0:0 $d
  done
  exit
fi
for d; do
  [ -n "$(ls -A "$d")" ] || continue
  mkdir -p "$home/seeds$d" && cp -a "$d/." "$home/seeds$d"
done
chown -R "$user:$user" "$home/seeds" && chmod -R u+rwX "$home/seeds"
