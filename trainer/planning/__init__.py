"""What a run will need, from the sizes of its model alone: parameters, memory, FLOPs, communication.
Nothing here imports torch or transformers but `probe`, which measures what the rest predicts."""
