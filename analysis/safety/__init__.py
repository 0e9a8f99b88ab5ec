"""Safety analyses of checkpoints: toxicity detection, toxic and negative continuations, hazardous knowledge, bias."""
