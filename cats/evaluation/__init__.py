"""Methods scored on tasks and texts, paired with the dense model on the same documents."""
