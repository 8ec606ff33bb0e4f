# shellcheck shell=bash
# Unpacks put.tar, which was uploaded to our folder. Follows put.sh.
# Arguments: our folder, the mark that the last line begins with, the directory to unpack it into.
cd "$1" || exit
place() { :; }
# shellcheck disable=SC2094  # it is only read
reply=$(put "$(stat -c %s put.tar)" "$3" <put.tar)
rm -f put.tar
echo "$2 $reply"
