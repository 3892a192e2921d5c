"""Multi-exit models: Hugging Face backbones with exits attached. They know no executor."""
