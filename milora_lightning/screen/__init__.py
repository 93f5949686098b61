"""The progress display of a run: figures as text, shown live on a terminal or as lines in files and pipes."""
