"""Pipeline stages and context parallelism against one process."""
