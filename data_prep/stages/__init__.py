"""The stages of a preparation, and the files that they hand on."""
