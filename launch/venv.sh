# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and .ci/run in the repository root.
# PYTHON names the interpreter that makes .venv. An existing .venv keeps its interpreter.

die() {
    echo "$0: $*" >&2
    exit 1
}

# ensure_venv EXTRA[,EXTRA]: install the project with these extras in .venv.
# Does nothing if pyproject.toml and constraints.txt have not changed since the last install.
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
        die "'$python' is older than Python 3.11; name a newer one (and remove .venv if it exists): PYTHON=python3.12 bash $0"
    # Without ensurepip, `-m venv` would leave an incomplete .venv.
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "'$python' cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"

    [[ -e .venv ]] || "$python" -m venv .venv
    # An interrupted run may have left .venv without pip.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null

    echo "Installing rae_jax[$extra] into .venv (once; a few minutes at most) ..." >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extra]" ||
        die "pip could not install rae_jax[$extra] (its message is above); fix that and run this again"
    touch "$stamp"
}
