# shellcheck shell=bash
# The command of a container, in the place of Harbor's `sleep infinity`: ends when its standard input
# does. As process 1, which it is without an ENTRYPOINT, a bash also buries orphans.
while read -r _; do :; done
