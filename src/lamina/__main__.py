"""`python -m lamina` is `lamina` (and what `torchrun -m lamina train ...` starts)."""

from lamina.cli import main

if __name__ == "__main__":
    main()
