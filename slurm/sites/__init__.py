"""Site files that ship with lmworks: one for each way of running the ranks, to be copied and filled in."""
