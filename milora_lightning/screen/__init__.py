"""What a run shows while it goes on: figures in words, and two ways to show them, live and in lines."""
