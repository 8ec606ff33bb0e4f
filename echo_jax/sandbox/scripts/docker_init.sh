# shellcheck shell=bash
# Process 1 of a container: fills the agent's directories, which are empty tmpfs, with what the image
# holds there; then serves the requests that come on standard input, one line each, and answers on
# standard output (see docker/strict.py). Follows put.sh.
# Arguments: PATH, the directory of those copies (docker_fit.sh made them), the agent's directories.
PATH=$1 seeds=$2; shift 2
umask 022
exec 7<> <(:) # a pipe on which nothing comes: a read of it sleeps without a process
for d; do
  [[ ! -d $seeds$d ]] || problem=$(cp -a "$seeds$d/." "$d/" 2>&1) || {
    echo "the image's $d does not fit in disk_mb ($?; ${problem//$'\n'/; })"; exit 1
  }
done
exec 2>/dev/null
place() { :; }
echo ready
while IFS=' ' read -r request size escaped; do
  printf -v path %b "$escaped"
  case $request in
    # Again and again, since a fork bomb makes new ones.
    kill) while kill -9 -1; do read -r -t .001 -u 7; done; echo 'done' ;;
    put) put "$size" "$path" ;;
  esac
done
