"""The nested model, what it is compared with, and what they share."""
