"""What a finished run gets wrong, and which parts of the picture led to it."""
