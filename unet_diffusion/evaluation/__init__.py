"""How good a model is: figures of samples, reconstructions and masks, and what they mean."""
