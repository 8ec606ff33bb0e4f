# shellcheck shell=bash
# Runs the task's tests, by their first line, which write the reward.
[ -x /tests/test.sh ] || chmod +x /tests/test.sh
(/tests/test.sh) > /logs/verifier/test-stdout.txt 2>&1 < /dev/null
