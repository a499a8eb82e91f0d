"""The processes of a gang: the leader, the workers, how they start and meet."""
