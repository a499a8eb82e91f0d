"""What ranks send each other: headers, hidden states, and the exchange of context parallelism."""
