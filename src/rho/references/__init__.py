"""Where reference losses come from when the reference is not a model in this process."""
