# shellcheck shell=bash disable=SC2034
# Sourced by the launchers of this folder: options, and --dry-run.

# Printing what the first lines of the script say is the help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# parse_options "allowed names" "required names" "$@": fills option[name], flags without a value become 1, what follows -- is command.
[ "${BASH_VERSINFO[0]}" -ge 4 ] || die "bash 4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)"
FLAGS=" spot gpu keep dry-run "
declare -A option=()
command=()
parse_options() {
  local allowed=" $1 dry-run" required="$2" name
  shift 2
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --) shift; command=("$@"); break ;;
      --*)
        name="${1#--}"
        case "$allowed " in *" $name "*) ;; *) die "unknown option $1; there are:${allowed// / --}" ;; esac
        if [[ "$FLAGS" = *" $name "* ]]; then
          option[$name]=1
        else
          [ $# -gt 1 ] || die "$1 needs a value"
          option[$name]="$2"
          shift
        fi
        shift ;;
      *) die "unexpected argument $1 (a command goes after --)" ;;
    esac
  done
  for name in $required; do
    [ -n "${option[$name]:-}" ] || die "--$name is required"
  done
}

# The words of a command as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command; with --dry-run prints it instead.
run() { if [ -n "${option[dry-run]:-}" ]; then quoted "$@"; else "$@"; fi; }

# The TPU VMs of a queued resource: one of its name, or with several slices NAME-0, NAME-1, ...
nodes() {
  if [ "${option[slices]:-1}" -eq 1 ]; then echo "${option[name]}"; else seq -f "${option[name]}-%g" 0 $((option[slices] - 1)); fi
}
