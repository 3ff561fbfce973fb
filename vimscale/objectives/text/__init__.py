"""Text for objectives: captions of samples, tokenizers, and an encoder of token sequences."""
