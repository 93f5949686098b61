"""Sources for the paper's data sets and benchmarks, and for generated word problems."""
