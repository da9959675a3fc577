"""One decoding loop for all tasks: prompts in, steps out, then chunks of text and sound."""
