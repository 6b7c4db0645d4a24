"""Models by name, folder or GGUF file, and the shapes of those that are only timed."""
