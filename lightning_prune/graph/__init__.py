"""Floor 1: which slices of which parameters live and die together. Knows torch only; see README.md here."""
