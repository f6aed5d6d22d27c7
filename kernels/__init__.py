"""The two pieces below the stages: the log-prob kernel and packed, prefix-shared attention."""
