"""lmworks, the serving half: model folder in, verified and measured artifact out. Training lives in `trainer`."""
