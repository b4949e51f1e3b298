"""`alpro ablate`: a grid of runs over several seeds, its table and its statistics; docs/ablation.md."""
