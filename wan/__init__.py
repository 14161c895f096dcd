"""The real world: Wan2.1's weights, codec and prompts, and datasets of real videos.

The codec and the data tools need requirements-wan.txt.
"""

import sys

from engine.threads import spin_briefly_beside_others

if sys.argv[0] == "-m":  # a program of this package is about to run
    spin_briefly_beside_others()

from .data import World
from .weights import (
    as_base,
    config,
    export,
    find,
    is_wan,
    kept_in,
    layout,
    load,
    open_base,
    open_model,
)
