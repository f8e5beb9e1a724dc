# shellcheck shell=bash
# Parses options of the launchers in bash: `launch/X.sh --option=value ... -- flags of the command`. Source it with `root` set.

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3

die() {
    echo "error: $*" >&2
    exit 2
}

# Prints a command as one could type it.
show() {
    local word line=''
    for word; do
        [[ $word =~ ^[-A-Za-z0-9_=:/.,+@]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
    done
    echo "$line"
}

# Runs a command, or prints it in a dry run.
run() {
    if [[ $dry_run ]]; then show "$@"; else "$@"; fi
}

# take "NAMES" "$@": sets a variable for each option (--spot sets it to 1), `dry_run`, and `flags` to all words after `--`.
take() {
    local _known=" $1 dry_run " _name # names that no option has
    shift
    dry_run='' flags=()
    while (($#)) && [[ $1 != -- ]]; do
        _name=${1%%=*}
        _name=${_name#--}
        [[ $1 == --* && $_known == *" $_name "* ]] ||
            die "unknown option '$1': choose from$(printf " --%s" $_known); flags of the command come after --"
        if [[ $1 == *=* ]]; then printf -v "$_name" %s "${1#*=}"; else printf -v "$_name" 1; fi
        shift
    done
    (($#)) && shift
    flags=("$@")
}

# Stops when the flag is missing that every run needs. A run that exists has a config, so --config is not one of them.
need_a_run() {
    [[ " ${flags[*]-}" == *" --workdir="* ]] || die "--workdir=... is missing: set it after --, as the first lines of $0 show"
}
