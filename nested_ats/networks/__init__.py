"""Attention networks and encoders."""
