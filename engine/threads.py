"""How long OpenMP's threads wait busily for one another. Imports no torch, which reads it once."""

import os

# Enough for what lies between two parallel regions when the cores are free. By default libgomp
# waits thirty times as long, and where another process has a core, every region costs that.
SPINS = "10000"


def bound_spinning():
    """Called by a program before torch is loaded. What the user has set wins."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
