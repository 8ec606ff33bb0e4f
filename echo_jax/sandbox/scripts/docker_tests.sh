# shellcheck shell=bash
# Runs the task's tests, by their first line, which write the reward.
# Argument: the directory to be in.
cd -- "$1" || exit
unset OLDPWD
[ -v HOME ] || HOME=~
export HOME
(/tests/test.sh) >/logs/verifier/test-stdout.txt 2>&1 </dev/null
