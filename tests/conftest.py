"""Commands that tests start as processes of their own run this tree, as pytest itself does."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / room) for room in (".", "cli", "reference", "fixtures"))
