"""Images: where they come from, which of them make up batch k, how they are augmented, how they are loaded."""
