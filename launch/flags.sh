# shellcheck shell=bash disable=SC2034
# What the launch scripts share: flags like those of the programs, quoting, dry runs. Scripts source
# it; it starts nothing itself.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this is bash $BASH_VERSION; bash 4.4 or newer is needed, install it" >&2
  exit 1
fi

declare -A flags=([dry_run]=false) # the defaults; a script adds its own. 'false' marks a switch
extra=()                           # what follows --: flags for the program that is launched

die() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment that a script begins with.
usage() {
  sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
}

parse_flags() {
  local name
  while (($#)); do
    case $1 in
      --) extra=("${@:2}") && return ;;
      --*) ;;
      *) die "unexpected argument '$1'; flags are --name=VALUE, those for the program follow --" ;;
    esac
    name=${1#--} name=${name%%=*}
    if [[ ! $name =~ ^[a-z_]+$ || ! -v flags[$name] ]]; then
      die "unknown flag '--$name'; $0 help lists them, those for the program follow --"
    fi
    case $1,${flags[$name]} in
      *=*,true | *=*,false) die "--$name takes no value" ;;
      *=*,*) flags[$name]=${1#*=} ;;
      *,true | *,false) flags[$name]=true ;;
      *) die "--$name needs a value: --$name=VALUE" ;;
    esac
    shift
  done
}

need() {
  [[ ${flags[$1]} ]] || die "--$1 is missing; $2"
}

# Prints the words as one line that a shell reads as the same words.
quoted() {
  local word line=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  echo "${line[*]}"
}

# Runs the command, or only prints it in a dry run.
run() {
  if ${flags[dry_run]}; then quoted "$@"; else "$@"; fi
}
