"""The parts that are grafted onto a language model: plain numbers and tensors in, tensors out."""
