# Sourced by the other scripts: makes .venv if it is not there and installs rdx into it, with the given extra.
# A second call finds everything in place and does nothing. RDX_PYTHON names another interpreter (3.11 or newer).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_rdx() {
  local extra="$1" python="${RDX_PYTHON:-python3}" stamp
  # The stamp changes with the requirements, so an old environment is brought up to date.
  stamp=".venv/.installed-${extra:-core}-$(cksum < pyproject.toml | cut -d ' ' -f 1)"
  if [ ! -f "$stamp" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "rdx needs Python 3.11 or newer, $python is $("$python" --version): set RDX_PYTHON to one." >&2
      exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing rdx into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    touch "$stamp"
  fi
  # Compiled programs are kept between runs.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
}
