# shellcheck shell=bash
# Leaves the agent's shell behind in an environment of Harbor's, in a session of its own. It reads
# from the FIFO `in`, reports on the FIFO `done`, and writes to the files `out` and `err`.
# Arguments: our folder, the mark that the last line begins with, the shell's first line in base64.
folder=$1 mark=$2 line=$3
# shellcheck disable=SC2174  # the directory above it is /tmp
{ mkdir -p -m 700 "$folder" && cd "$folder" && rm -f in 'done' && mkfifo in 'done'; } || exit
{ : >out && : >err && exec 4<>in 3<>'done'; } || exit
# Standard output of the shell is the report's FIFO, 8 and 9 are its real streams
# (channels.command_lines). Its parent reports how it died. `setsid --fork` and not `&`, which would
# make everything in it ignore SIGINT.
setsid --fork bash -c '
  exec 5<>in 3<>done
  unset SHLVL
  bash --norc --noprofile -s <&5 >done 8>>out 9>>err 2>&9 3<&- 5<&-
  echo "dead $?" >&3' </dev/null >/dev/null 2>&1 3<&- 4<&-
printf %s "$line" | base64 -d >&4
read -r -t 20 report <&3
echo "$mark $report"
