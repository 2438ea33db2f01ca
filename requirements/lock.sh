#!/usr/bin/env bash
# Makes requirements/cpu.lock and requirements/cuda.lock from pyproject.toml. Run it after changing a dependency:
#     requirements/lock.sh            keep every version that still fits
#     requirements/lock.sh --upgrade  take the newest that fit
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || { echo "lock: uv is missing. Remedy: pip install uv" >&2; exit 1; }

# CPU builds of torch are not on PyPI: take them where pip is told to look, else from PyTorch's own index.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    torch_source=(--find-links "$PIP_FIND_LINKS")
else
    torch_source=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi

compile() { # KIND [SOURCE...]
    local kind=$1
    shift
    "$uv" pip compile pyproject.toml --quiet --extra "$kind" --extra dev --extra eval --override requirements/overrides.txt \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-find-links --no-emit-index-url \
        --custom-compile-command "requirements/lock.sh" --output-file "requirements/$kind.lock" "$@" >/dev/null
    echo "lock: requirements/$kind.lock has $(grep -c '==' "requirements/$kind.lock") packages"
}

compile cpu "${torch_source[@]}" "${@}"
compile cuda "${@}"
