"""The paper's data sets and tests, and problems made on the spot."""
