"""One run as a page, a summary or a model card."""
