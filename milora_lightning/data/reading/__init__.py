"""Files of all formats as records, and records as rows of texts or turns."""
