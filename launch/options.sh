# shellcheck shell=bash
# What the launchers in bash are given: `launch/X.sh --option=value ... -- the command's own flags`. Sourced, `root` set.

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3

die() {
    echo "error: $*" >&2
    exit 2
}

# One command as it could be typed.
show() {
    local word line=''
    for word; do
        [[ $word =~ ^[-A-Za-z0-9_=:/.,+@]+$ ]] || word=${word@Q}
        line+="${line:+ }$word"
    done
    echo "$line"
}

# Does it; or shows it, in a dry run.
run() {
    if [[ $dry_run ]]; then show "$@"; else "$@"; fi
}

# take "NAMES" "$@": sets the variable of each option (of --spot, to 1), `dry_run`, and `flags` to what follows `--`.
take() {
    local _known=" $1 dry_run " _name # which no option is called
    shift
    dry_run='' flags=()
    while (($#)) && [[ $1 != -- ]]; do
        _name=${1%%=*}
        _name=${_name#--}
        [[ $1 == --* && $_known == *" $_name "* ]] ||
            die "unknown option '$1': there are$(printf " --%s" $_known); the command's own flags stand behind --"
        if [[ $1 == *=* ]]; then printf -v "$_name" %s "${1#*=}"; else printf -v "$_name" 1; fi
        shift
    done
    (($#)) && shift
    flags=("$@")
}

# What no run can be without.
need_a_run() {
    local name
    for name in config workdir; do
        [[ " ${flags[*]-}" == *" --$name="* ]] || die "no --$name=... behind --: see the first lines of $0"
    done
}
