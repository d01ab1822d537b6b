#!/usr/bin/env bash
# Runs every test; further arguments go to pytest. RDX_SLOW=1 includes the slow ones (last, none begun later
# than RDX_SLOW_MINUTES, in the order that RDX_SLOW_SEED draws), RDX_DATA_DIR the real data sets.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_rdx test
.venv/bin/python -m pytest --numprocesses 2 --dist loadgroup "$@"
