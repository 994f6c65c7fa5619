"""What both training loops share: the run folder, its checkpoints and journal, the optimiser."""
