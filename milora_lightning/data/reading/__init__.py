"""Reading of data files into records, and conversion of records into rows of text."""
