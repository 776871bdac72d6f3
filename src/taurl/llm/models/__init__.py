"""Models: loading them, adapters, heads, critics, reward models, and writing them out."""
