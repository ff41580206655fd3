"""What a finished run gets wrong, and what in the picture made it say so."""
