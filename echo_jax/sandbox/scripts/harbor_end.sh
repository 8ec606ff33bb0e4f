# shellcheck shell=bash
# Kills what began at or after a time. Follows harbor_kill.sh.
# Arguments: our folder (unused), the mark that the last line begins with, nothing, the time in ticks.
end_since "$4" && echo "$2 clear"
