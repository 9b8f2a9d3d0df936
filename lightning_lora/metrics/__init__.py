"""What a model keeps of earlier tasks when it learns later ones."""

from lightning_lora.metrics.continual import BackwardTransfer, Forgetting, backward_transfer, forgetting

__all__ = ["BackwardTransfer", "Forgetting", "backward_transfer", "forgetting"]
