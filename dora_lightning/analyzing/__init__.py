"""Learning patterns: how far magnitudes and directions moved, as records of a run or from finished models."""
