"""Fine-tune, evaluate and use language models: ``python main.py fit --config milora.yaml``."""

from milora_lightning.__main__ import main

if __name__ == "__main__":
    main()
