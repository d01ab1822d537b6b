#!/usr/bin/env bash
# The main job on the embedded digits: robustify, certify, attack, one table. Minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_rdx ""
.venv/bin/python -m experiments.a5_tables --dataset digits --preset cpu "$@"
