"""One training step on the device, and the state that it changes."""
