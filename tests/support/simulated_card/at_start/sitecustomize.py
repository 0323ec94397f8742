"""With this folder on PYTHONPATH a program has the simulated card without knowing of it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import simulated_card

simulated_card.install()
