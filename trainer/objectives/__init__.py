"""What is minimised: callables `(model, batch) -> LossSum`. They know nothing of ranks, accumulation or optimizers."""
