"""What every training run needs, whichever wing it is in."""
