"""`python -m experiments.nano`: see `build.py`."""

from .build import main

if __name__ == "__main__":
    main()
