"""Fine-tuning, evaluation and prediction with timm's dense models."""
