"""Synthetic tasks, one file each: the generator of its sequences and the scorer of the answers."""
