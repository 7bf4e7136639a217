"""See `torchtitan`."""
