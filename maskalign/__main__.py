"""`python -m maskalign` is the command `maskalign`."""

from maskalign.cli import main

if __name__ == "__main__":
    main()
