# shellcheck shell=bash
# Prepares an environment of Harbor's for the other scripts: our folder, the task's directories.
# Arguments: our folder, the mark that the last line begins with, the workdir (empty: the image's).
# Reports when this process began, in ticks since the machine started (field 22 of its stat), and the
# workdir in base64.
folder=$1 mark=$2 workdir=$3
mkdir -m 700 "$folder" || exit
[[ $workdir ]] || { workdir=$PWD; [[ $workdir != / ]] || workdir=/app; }
mkdir -p "$workdir"; cd "$workdir" || exit
mkdir -p /logs/agent /logs/verifier /logs/artifacts
read -r stat </proc/$$/stat
read -ra fields <<<"${stat##*) }"
echo "$mark ${fields[19]} $(printf %s "$PWD" | base64 -w 0)"
