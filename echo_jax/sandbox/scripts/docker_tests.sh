# shellcheck shell=bash
# Runs the task's tests, by their first line, which write the reward.
# Argument: the directory to be in.
cd -- "$1" || exit
unset OLDPWD
[ -v HOME ] || HOME=~
export HOME
(
  # Python runs the modules sitecustomize and usercustomize as it starts, and no package has them. The
  # rest of the account's own packages stays, since a task may ask for one.
  own=${PYTHONUSERBASE:-$HOME/.local}
  chmod u+rwx "$own" "$own/lib" 2>/dev/null
  chmod u+rwx "$own"/lib/python*{,/site-packages} 2>/dev/null
  rm -rf "$own"/lib/python*/site-packages/{site,user}customize{,.*} || exit
  /tests/test.sh
) >/logs/verifier/test-stdout.txt 2>&1 </dev/null
