"""The real world: Wan2.1's weights, codec and prompts, and datasets of real videos.

The codec and the data tools need requirements-wan.txt.
"""

from .data import World
from .weights import config, export, find, is_wan, layout, load
