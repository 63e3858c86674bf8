"""The modules of benchmarks/trajectory, which are scripts beside the package, for the tests."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "trajectory"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import curves
import ours
import sets

__all__ = ["curves", "ours", "sets"]
