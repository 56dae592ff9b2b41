"""The only code that knows Accelerate: prepare, backward, step, agree, save and load, and the loop around them."""
