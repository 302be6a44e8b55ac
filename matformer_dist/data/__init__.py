"""From text to batches of token ids: tokenizer, preparation of corpora, training datasets."""
