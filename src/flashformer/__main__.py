"""`python -m flashformer`: the same as the `flashformer` script."""

from flashformer.serve.cli import main

if __name__ == "__main__":
    main()
