# shellcheck shell=bash
# Leaves an environment of Harbor's to its verifier, without our folder.
# Arguments: our folder, the mark that the last line begins with.
rm -rf "$1"
echo "$2 left"
