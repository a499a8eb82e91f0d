"""Which steps are not computed, what stands in for them, and the log of the decisions."""
