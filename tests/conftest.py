import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # plain `pytest` finds the modules of the repository root
