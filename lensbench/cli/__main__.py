"""``python -m lensbench.cli``."""

from lensbench.cli import main

if __name__ == "__main__":
    main()
