"""Floor 2: what goes and how it goes. Knows torch and the graph floor only."""
