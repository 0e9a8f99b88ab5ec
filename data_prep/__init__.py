"""Text to documents to tokens to packed, shuffled, hashed HDF5 shards."""
