"""Which rank is where, and which layers it holds. Plain Python."""
