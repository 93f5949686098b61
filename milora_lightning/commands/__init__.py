"""Commands of the command line, one in each file; imported when they are called."""
