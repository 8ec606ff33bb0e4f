# shellcheck shell=bash
# Gives the shell of harbor_open.sh one command, and waits for its report. Prints, a line each, what
# the command wrote to stdout and to stderr, in base64, and the report: the shell's own, or `dead`
# and an exit code, `timeout`, `flood` (too much output) or `gone` (our folder was removed).
# Arguments: our folder, the mark that the last line begins with, the command's lines in base64,
# how many slices of time it has, the seconds of a slice, the bytes of output that end it, and the
# bytes that are kept of each stream.
folder=$1 mark=$2 line=$3 slices=$4 slice=$5 discard=$6 keep=$7
{ cd "$folder" && exec 4<>in 3<>'done'; } || { printf '\n\n%s gone\n' "$mark"; exit; }
printf %s "$line" | base64 -d >&4
report=
until read -r -t "$slice" part <&3 && report=$report$part; do
  report=$report$part
  (( --slices > 0 )) || { report=timeout; break; }
  (( $(stat -c %s out) + $(stat -c %s err) < discard )) || { report=flood; break; }
done
for stream in out err; do head -c "$keep" $stream | base64 -w 0; echo; : >$stream; done
echo "$mark $report"
