"""One script per protocol of a paper; run as `python -m experiments.NAME`."""
