"""Raw pictures and captions -> shards -> encoded shards -> batches. Never imports torch."""
