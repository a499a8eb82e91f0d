"""How the family is sampled: figures and solvers, no weights."""
