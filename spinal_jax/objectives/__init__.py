"""Losses and the jitted step that training and comparison share."""
