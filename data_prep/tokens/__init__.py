"""Text to token ids: tokenizers, the two engines and where they agree, the tokens around documents."""
