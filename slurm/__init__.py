"""A recipe in, jobs of a SLURM cluster out."""
