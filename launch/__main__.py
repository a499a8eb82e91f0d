"""`python -m launch`, the same as the command `flowcache`."""

from launch.app import main

if __name__ == "__main__":
    main()
