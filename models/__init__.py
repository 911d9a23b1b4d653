"""The maths: decoder checkpoints, the PrivateLoRA adapter on a frozen base (the oracle of every parity test), tuning."""
