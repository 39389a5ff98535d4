"""`python -m comoe`: the command line."""

from comoe.cli import main

if __name__ == "__main__":
    main()
