"""What a run will need: the training step and the evaluation, compiled for chips that are not there."""
