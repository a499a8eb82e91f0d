"""What ranks do in tests: `python -m tests.parallel.scenarios NAME OUT ARGUMENTS`, started once for each rank.

The leader saves what it has made to OUT; errors are those of the gang.
"""
