"""looplm: Looped Language Models on an ordinary CPU, in NumPy and Numba.

Importing the package loads nothing heavy; import the part you need, e.g. `from looplm.model import forward`.
"""

__version__ = "0.1.0"
