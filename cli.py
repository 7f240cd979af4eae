"""Runs mmsearch from a checkout: `python cli.py search "a dog on the beach"`."""

from mmsearch.cli import main

if __name__ == "__main__":
    main()
