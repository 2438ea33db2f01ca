#!/usr/bin/env bash
# Makes .venv as the lock says, and does nothing when it is already there. `make quickstart` and `make test` call it.
#   PYTHON=...  the Python 3.11 to use (else python3.11, python3 or python, whichever is 3.11)
#   LOCK=...    the lock to install (else requirements/cuda.lock where nvidia-smi works, requirements/cpu.lock elsewhere)
set -uo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/.venv
log=$PWD/.venv-install.log

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
    local candidate version found=
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        version=$(version_of "$candidate")
        [ "$version" = 3.11 ] && { command -v "$candidate"; return; }
        [ -n "$version" ] && found+="${found:+, }$candidate is Python $version"
    done
    fail "Python 3.11 is needed and ${found:-${PYTHON:-a Python} was not found}." \
        "Remedy: install Python 3.11 and run again, or name it: make PYTHON=/path/to/python3.11"
}

choose_lock() {
    if [ -n "${LOCK:-}" ]; then
        [ -f "$LOCK" ] || fail "there is no lock $LOCK. Remedy: LOCK=requirements/cpu.lock or LOCK=requirements/cuda.lock"
        echo "$LOCK"
    elif nvidia-smi >/dev/null 2>&1; then
        echo requirements/cuda.lock
    else
        echo requirements/cpu.lock
    fi
}

check_disk() {
    local needed=6 free
    grep -q '^nvidia-' "$lock" && needed=16
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$needed" ] ||
        fail "$needed GB of disk space are needed under $PWD and $free GB are free. Remedy: free some, or clone elsewhere"
}

explain_failure() { # WHAT
    if grep -qiE 'no space left on device' "$log"; then
        fail "the disk is full. Remedy: free 6 GB here and in ${TMPDIR:-/tmp}, and run again (log: $log)"
    elif grep -qiE 'connection|temporary failure in name|timed? ?out|no matching distribution|could not find a version' "$log"; then
        fail "could not download $1 from the package index. Remedy: check the network or pip's index settings (pip config list)," \
            "and run again; what was done is kept (log: $log)"
    fi
    fail "could not install $1: $(grep -iE '^ *error' "$log" | tail -1). Remedy: see the log $log"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --retries 2 "$@" >>"$log" 2>&1; }

install_torch() {
    local torch
    torch=$(grep -m1 '^torch==' "$lock")
    say "installing $torch"
    # Wherever pip is told to look comes first. CPU builds are not on PyPI, but PyTorch has an index of them.
    pip_install "$torch" || { [[ $torch == *+cpu ]] && pip_install "$torch" --index-url https://download.pytorch.org/whl/cpu; } ||
        explain_failure "$torch"
}

[ "$(uname -s)/$(uname -m)" = Linux/x86_64 ] ||
    fail "Linux on x86_64 is needed and this is $(uname -s) on $(uname -m). Remedy: run it in a Linux container or machine"
exec 9<"$0" && { ! command -v flock >/dev/null || flock 9; } # two commands at once: the second waits and finds it done

python=$(find_python) || exit 1
lock=$(choose_lock) || exit 1
key=$("$python" - "$lock" "$PWD" <<'PY'
import hashlib, sys
lock, root = sys.argv[1:]
print(hashlib.sha256(open(lock, "rb").read() + root.encode() + sys.version.encode()).hexdigest())
PY
)
package_key=$(cksum pyproject.toml)
[ "$(cat "$venv/rayward.installed" 2>/dev/null)" = "$key $package_key" ] && exit 0

say "setting up $venv with $("$python" --version) and $lock (once; one to five minutes)"
check_disk
: >"$log" || exit 1
if [ "$(cat "$venv/rayward.started" 2>/dev/null)" != "$key" ]; then # else go on with what an interrupted run left
    "$python" -m venv --clear "$venv" >>"$log" 2>&1 ||
        fail "$python cannot make a virtual environment. Remedy: install its venv module (Debian and Ubuntu: apt install python3.11-venv)"
    echo "$key" >"$venv/rayward.started"
fi
# What is installed already is found to be so in seconds, so no step needs a memory of its own.
install_torch
say "installing $(grep -c '==' "$lock") packages"
pip_install -r "$lock" || explain_failure "the packages of $lock"
say "installing rayward"
pip_install --no-build-isolation --editable . || explain_failure "rayward"
echo "$key $package_key" >"$venv/rayward.installed"
rm -f "$log"
say "ready"
