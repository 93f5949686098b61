"""Training the runs of a comparison, one after the other or in parallel."""
