"""Which optimizations fit a lab's GPUs when it fine-tunes a language model, how fast each is, and what it costs."""
