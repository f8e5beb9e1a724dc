# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and .ci/run, from the repository root.
# PYTHON names the interpreter that makes .venv; a .venv that is there keeps the one it has.

die() {
    echo "$0: $*" >&2
    exit 1
}

# ensure_venv EXTRA[,EXTRA]: .venv holds the project with these extras. Does nothing, at once, when neither the
# dependencies nor their pinned versions changed since the last install.
ensure_venv() {
    local extra=$1 stamp=.venv/.installed-$1 python=${PYTHON:-python3}
    if [[ -x .venv/bin/python && $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]]; then
        return
    fi

    if [[ -e .venv ]]; then
        python=.venv/bin/python
        "$python" -c '' 2>/dev/null || die "the Python of .venv does not run; remove .venv and run this again"
    fi
    command -v "$python" >/dev/null || die "no '$python' found; install Python 3.11 or newer, or name one: PYTHON=python3.12 bash $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "'$python' is older than Python 3.11; name a newer one (remove .venv if it is there): PYTHON=python3.12 bash $0"
    # Without ensurepip, `-m venv` would leave a half-made .venv behind: look before.
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "'$python' cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"

    [[ -e .venv ]] || "$python" -m venv .venv
    # An interrupted run may have left .venv without pip.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

    echo "Installing rae_jax[$extra] into .venv (once; a few minutes at most) ..." >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extra]" ||
        die "pip could not install rae_jax[$extra] (its message is above); mend that and run this again"
    touch "$stamp"
}
