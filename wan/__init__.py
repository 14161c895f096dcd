"""The real world: Wan2.1's weights, codec and prompts, and datasets of real videos. The codec and the data tools need requirements-wan.txt."""

import sys

if sys.argv[:1] == ["-m"]:  # as a command; Ctrl-C ends it quietly, also in the imports
    sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

from .data import World
from .weights import config, export, find, is_wan, layout, load
