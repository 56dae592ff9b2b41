"""lmworks, the training half: text in, model folder out. Export and serving live in `export`."""
