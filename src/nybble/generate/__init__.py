"""Generation: from logits to tokens to text. Options, samplers, stop strings, the loop itself."""
