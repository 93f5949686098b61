"""What runs of several methods say about these methods: statistics, findings, and reports."""
