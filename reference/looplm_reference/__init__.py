"""The judge: LoopLM in plain NumPy and float64, and the checks that measure any other implementation against it."""
