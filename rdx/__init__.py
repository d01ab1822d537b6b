"""rdx: adversarial robustness research in JAX.

Rooms are imported by name, `from rdx import attacks, balls, bounds`; nothing heavy is imported until it is asked for.
"""

__version__ = "0.1.0"
