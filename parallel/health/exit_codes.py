"""The exit codes of the command line and of ranks. No torch in here: the command line reads them at once."""

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # 128 + SIGINT, as shells count
NO_OUTPUT = 3  # all is done, but standard output takes no more
