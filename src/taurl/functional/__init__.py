"""The mathematics: pure tensor functions, torch only, no state and no input or output."""
