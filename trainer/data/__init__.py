"""From text to batches: sources, tokenizer, token shards, packing, masking and order. Knows no model and no engine."""
