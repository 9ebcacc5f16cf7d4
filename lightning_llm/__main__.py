"""``python -m lightning_llm`` is ``lightning-llm``."""

from lightning_llm.cli import main

if __name__ == "__main__":
    main()
