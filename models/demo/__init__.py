"""The demo model: its data generator, tokenizer, training script and evaluation."""
