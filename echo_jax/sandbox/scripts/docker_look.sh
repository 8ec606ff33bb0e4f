# shellcheck shell=bash
# Says of /logs/verifier and /tests what changes whenever somebody writes there, and fails if there is a reward.
stat -c '%d %i %z' /logs /logs/verifier /tests
[ -z "$(ls -A /logs/verifier)" ]
