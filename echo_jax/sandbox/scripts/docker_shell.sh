# shellcheck shell=bash
# The agent's shell in a container, under the name that bash's messages begin with. $0 is the shell's
# path: none is looked up by PATH, in which the agent may have put a bash of its own.
unset BASH_ENV; exec -a bash "$0" --norc --noprofile -s
