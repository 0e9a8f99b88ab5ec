"""Models as Hugging Face folders."""
