"""Records, the renderer and readers that make them, and their way to a batch."""
