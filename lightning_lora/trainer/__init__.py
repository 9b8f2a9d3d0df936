"""All that touches a Trainer."""
