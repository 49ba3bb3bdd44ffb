"""Text to batches: sources of documents, tokenizers, and windows of token ids. Knows no model."""
