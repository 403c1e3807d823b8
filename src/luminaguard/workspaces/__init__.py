"""The user's folder: read as an immutable state, carried into a machine, published back whole or not."""
