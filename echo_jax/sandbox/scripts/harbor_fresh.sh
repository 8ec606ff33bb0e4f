# shellcheck shell=bash
# Runs one command in a bash of its own. Prints, a line each, what it wrote to stdout and to stderr,
# in base64, and a report: `code` and the exit code, or `timeout` or `flood` (too much output) and when
# the command began. Then all that was not there before has been killed. Follows harbor_kill.sh.
# Arguments: our folder, the mark that the last line begins with, the command in base64, how many
# slices of time it has, the seconds of a slice, the bytes of output that end it, and the bytes that
# are kept of each stream.
folder=$1 mark=$2 slices=$4 slice=$5 discard=$6 keep=$7
command=$(printf %s "$3" | base64 -d; echo .) # the dot, since $() drops newlines at the end
out=$folder/out err=$folder/err why=$folder/why
# shellcheck disable=SC2174  # the directory above it is /tmp
{ mkdir -p -m 700 "$folder" && rm -f "$folder"/* && : >"$out" && : >"$err"; } || exit
mkfifo "$folder/never" || exit
# The command begins a tick (a hundredth of a second) after this, so that what is as old as it is can
# only be its own, and what is older cannot.
read -r -t 0.01 _ <>"$folder/never"
read -r stat </proc/$$/stat
read -ra fields <<<"${stat##*) }"
born=$((fields[19] + 1))
# The command is in the foreground and this is not, since bash lets what is in the background ignore
# SIGINT. It waits by `read`, so that no process of ours appears beside the command's.
watch() {
  local reason=flood
  while (( $(stat -c %s "$out") + $(stat -c %s "$err") < discard )); do
    (( slices-- > 0 )) || { reason=timeout; break; }
    read -r -t "$slice" _ <>"$folder/never"
  done
  echo "$reason $born" >"$why"
  end_since "$born"
}
watch </dev/null >/dev/null 2>&1 &
unset SHLVL OLDPWD
bash -c "${command%.}" </dev/null >"$out" 2>"$err"
report="code $?"
kill $! 2>/dev/null
wait
[[ ! -s $why ]] || report=$(<"$why")
for stream in "$out" "$err"; do head -c "$keep" "$stream" | base64 -w 0; echo; done
rm -rf "$folder"
echo "$mark $report"
