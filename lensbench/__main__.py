"""``python -m lensbench``, which is what torchrun starts."""

from lensbench.cli import main

if __name__ == "__main__":
    main()
