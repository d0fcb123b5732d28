"""`python -m dsgpt` is the `dsgpt` command."""

from dsgpt.cli import main

if __name__ == "__main__":
    main()
