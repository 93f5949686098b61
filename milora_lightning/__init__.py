"""MiLoRA for PyTorch Lightning."""
