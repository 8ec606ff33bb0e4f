# shellcheck shell=bash
# put SIZE DIRECTORY [OPTION OF TAR...]: unpacks the tar archive that is the next SIZE bytes of standard input into
# DIRECTORY, and prints one line: `done`, or `error` and the reason. DIRECTORY is absolute and has
# no `..`. No link is followed on the way to it. Whatever happens, exactly SIZE bytes are read.
#
# Shared by process 1 of the local and the Docker sandbox and by Harbor's shell. Each defines
# `place DIRECTORY`, which makes room for DIRECTORY if the sandbox has to. Uploads are much of what
# a short episode costs, so no process is started for what bash can do itself.
put() {
  local size=$1 directory=$2 error
  if error=$(head -c "$size" | {
    place "$directory" && {
      { cd -P -- "$directory" && [[ $PWD == "$directory" ]]; } 2>/dev/null || {
        {
          [[ $(realpath -m -- "$directory") == "$directory" ]] ||
            { echo 'a link lies on the way'; false; }
        } && mkdir -p -- "$directory" && cd -- "$directory"
      }
    } && tar -xpf - --no-same-owner "${@:3}"
    status=$?
    # What tar did not want is read too; the next request begins after it.
    if [[ $status != 0 ]] || read -r -N 1; then cat >/dev/null; fi
    exit $status
  } 2>&1); then
    echo 'done'
  else
    echo "error ${error//$'\n'/; }"
  fi
}
