"""`python -m textharmony`."""

from textharmony.cli import main

if __name__ == "__main__":
    main()
